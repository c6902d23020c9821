// Tiles of 128 rows of FP8 weights and 128 or 256 tokens: what linear_fp8_wide.cu and linear_fp8_split.cu share. Two
// groups of four warps have 64 tokens of a piece each, and their scales; four more warps bring weights and tokens.
#pragma once
#include "common/formats.cuh"
#include "common/wgmma.cuh"

constexpr int TILE = 128;             // rows, tokens of a piece, columns
constexpr int PIECE = TILE * TILE;    // bytes
constexpr int FEEDERS = 128, GROUP = 128, CONSUMERS = 2 * GROUP;  // threads
constexpr int GROUP_TOKENS = 64, D = 64;                          // of a group's product; its sums in a thread
constexpr int MOST_STAGES = 8, FILLS = 2;  // copies that a stage is filled by
constexpr int RUN = 4;                     // blocks of columns whose scales are loaded together

// groups: of rows, each of which has columns of its own of every token.
struct Sizes {
  int rows, tokens, blocks, segments, groups;
};

struct Place {
  int row, token;
};

// The tiles, `width` of tokens taken together, for all rows.
template <int TOKENS>
struct Tiles {
  int high, wide, width;

  __device__ Tiles(const Sizes& s, int width)
      : high((s.rows + TILE - 1) / TILE), wide((s.tokens + TOKENS - 1) / TOKENS), width(width) {}
  __device__ int count() const { return high * wide; }
  __device__ Place operator()(int tile) const {
    const int first = tile / (width * high) * width, rest = tile - first * high, beside = min(width, wide - first);
    return {rest / beside * TILE, (first + rest % beside) * TOKENS};
  }
};

// The blocks of columns from `first` to `last` of every `step`th tile from `start` on.
template <int TOKENS>
struct Walk {
  const Tiles<TOKENS>& tiles;
  int start, step, first, last;

  template <class Visit>
  __device__ __forceinline__ void visit(Visit visit) const {
    for (int tile = start; tile < tiles.count(); tile += step) {
      const Place at = tiles(tile);
#pragma unroll 1  // feeders have few registers
      for (int b = first; b < last; b++) visit(at, b);
    }
  }
};

// Stages of 128 columns each: weights and tokens.
template <int PIECES>
struct Ring {
  static constexpr int BYTES = (1 + PIECES) * PIECE;
  Barrier *full, *empty;
  u8* data;
  int stages, stage = 0;
  u32 parity = 0;

  __device__ u8* weights() const { return data + stage * BYTES; }
  __device__ u8* tokens() const { return data + stage * BYTES + PIECE; }
  __device__ void await_full() const { full[stage].wait(parity); }
  __device__ void await_empty() const { empty[stage].wait(parity ^ 1); }  // true at once the first time
  __device__ void next() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
  // A warp's products of the stage are done. What follows is a copy: one lane may speak for all.
  __device__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) empty[stage].arrive();
    next();
  }
};

__device__ __forceinline__ void meet_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); }

// 128 columns of a group's tokens times 128 rows, from zero: under way until `wgmma_wait`.
__device__ __forceinline__ void multiply(float (&part)[D], const u8* tokens, const u8* weights) {
  const u64 a = operand(tokens), b = operand(weights);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++) wgmma(part, a + 2 * k, b + 2 * k, k);
  wgmma_commit();
}

// scales: of the two tokens, eight apart, that a thread has 32 sums of each.
__device__ __forceinline__ void promote(float (&sum)[D], const float (&part)[D], float2 scales) {
#pragma unroll
  for (int i = 0; i < D; i++) sum[i] = fmaf(part[i], i & 2 ? scales.y : scales.x, sum[i]);
}

// The scales of a thread's two tokens of each piece and of the rows, a run of blocks of columns now and the next.
template <int PIECES>
struct Scales {
  const u8 *weight, *x;
  int apart, there, left;  // bytes from token to token; tokens from the thread's first on; blocks not loaded yet
  u32 by, codes[2 * PIECES], next_by, next[2 * PIECES];

  __device__ __forceinline__ void start(const u8* weight_scale, const u8* x_scale, const Sizes& s, Place at, int first,
                                        int last) {
    const int own = at.row / (s.rows / s.groups) * s.blocks, wide = s.groups * s.blocks;
    const int warp = threadIdx.x / 32 % 4, group = threadIdx.x / GROUP - 1;
    const int token = at.token + group * GROUP_TOKENS + warp * 16 + threadIdx.x % 32 / 4;
    weight = weight_scale + static_cast<i64>(at.row / TILE) * s.blocks + first;
    x = x_scale + static_cast<i64>(token) * wide + own + first;
    apart = wide, there = s.tokens - token, left = last - first;
    load();
  }
  __device__ __forceinline__ u32 run(const u8* p) const {
    if (left >= RUN && aligned(p, 0, RUN)) return *reinterpret_cast<const u32*>(p);
    u32 found = 0;
#pragma unroll 1
    for (int i = min(left, RUN); i > 0; i--) found = found << 8 | p[i - 1];
    return found;
  }
  __device__ __forceinline__ void load() {
    next_by = run(weight);
#pragma unroll
    for (int i = 0; i < 2 * PIECES; i++) {
      const int token = i / 2 * TILE + i % 2 * 8;
      next[i] = token < there ? run(x + token * apart) : 0;
    }
    weight += RUN, x += RUN, left -= RUN;
  }
  __device__ __forceinline__ void turn() {
    by = next_by;
#pragma unroll
    for (int i = 0; i < 2 * PIECES; i++) codes[i] = next[i];
    if (left > 0) load();
  }
  // Of the next block of columns.
  __device__ __forceinline__ float2 of(int piece) const {
    const float of_rows = ue8m0_float(by & 255);
    return {ue8m0_float(codes[2 * piece] & 255) * of_rows, ue8m0_float(codes[2 * piece + 1] & 255) * of_rows};
  }
  __device__ __forceinline__ void step() {
    by >>= 8;
#pragma unroll
    for (int i = 0; i < 2 * PIECES; i++) codes[i] >>= 8;
  }
};

// Weights and tokens of tile after tile, each by a thread of another warp.
template <int PIECES>
__device__ __forceinline__ void feed(Ring<PIECES> ring, const TensorMap& weight, const TensorMap& x, const Sizes& s,
                                     const Walk<PIECES * TILE>& each) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group_rows = s.rows / s.groups;
  if (warp == 0 && lane == 0)
    each.visit([&](Place at, int b) {
      ring.await_empty();
      ring.full[ring.stage].arrive_expecting(PIECE);
      copy_box(ring.weights(), weight, b * TILE, at.row, ring.full[ring.stage]);
      ring.next();
    });
  pdl_wait();
  if (warp == 1 && lane == 0)
    each.visit([&](Place at, int b) {
      ring.await_empty();
      ring.full[ring.stage].arrive_expecting(PIECES * PIECE);
      const int column = (at.row / group_rows * s.blocks + b) * TILE;
      copy_box(ring.tokens(), x, column, at.token, ring.full[ring.stage]);
      ring.next();
    });
  __syncwarp();
}
