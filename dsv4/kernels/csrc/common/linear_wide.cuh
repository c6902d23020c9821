// Tiles of 128 rows of FP8 weights and 128 or 256 tokens: what linear_fp8_wide.cu and linear_fp8_split.cu share. Two groups
// of four warps have 64 rows each and bring the scales of their own products; four more warps bring weights and tokens.
#pragma once
#include "common/formats.cuh"
#include "common/wgmma.cuh"

constexpr int TILE = 128;             // rows, tokens of a piece, columns
constexpr int PIECE = TILE * TILE;    // bytes
constexpr int FEEDERS = 128, GROUP = 128, CONSUMERS = 2 * GROUP;  // threads
constexpr int GROUP_ROWS = 64, D = 64;                            // of a group's product; its sums in a thread
constexpr int MOST_STAGES = 8, FILLS = 2;  // copies that a stage is filled by

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
  __device__ __forceinline__ void operator()(Visit visit) const {
    for (int tile = start; tile < tiles.count(); tile += step) {
      const Place at = tiles(tile);
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
};

__device__ __forceinline__ void meet_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); }

// 128 columns of a group's rows times 128 tokens, from zero: under way until `wgmma_wait`.
__device__ __forceinline__ void multiply(float (&part)[D], const u8* weights, const u8* tokens) {
  const u64 a = operand(weights), x = operand(tokens);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++) wgmma(part, a + 2 * k, x + 2 * k, k);
  wgmma_commit();
}

// `scales`: the four of the pairs of tokens that a thread has in two neighbouring eights, side by side.
__device__ __forceinline__ void promote(float (&sum)[D], const float (&part)[D], const float* scales) {
  const float4* const from = reinterpret_cast<const float4*>(scales) + threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < D; i += 8) {
    const float4 s = from[i / 2];
    sum[i] = fmaf(part[i], s.x, sum[i]), sum[i + 1] = fmaf(part[i + 1], s.y, sum[i + 1]);
    sum[i + 2] = fmaf(part[i + 2], s.x, sum[i + 2]), sum[i + 3] = fmaf(part[i + 3], s.y, sum[i + 3]);
    sum[i + 4] = fmaf(part[i + 4], s.z, sum[i + 4]), sum[i + 5] = fmaf(part[i + 5], s.w, sum[i + 5]);
    sum[i + 6] = fmaf(part[i + 6], s.z, sum[i + 6]), sum[i + 7] = fmaf(part[i + 7], s.w, sum[i + 7]);
  }
}

// Where the product of scales of a token of a piece stands.
__device__ __forceinline__ constexpr int scale_place(int token) {
  return (token / 16 * 4 + token % 8 / 2) * 4 + token / 8 % 2 * 2 + token % 2;
}

// The products of scales of a group's rows with the tokens of a tile. Each thread of the group brings those of one token of
// a piece, a stage ahead; they change places by way of shared memory, where two stages have room.
template <int PIECES>
struct Scales {
  float* held;  // [2][PIECES * TILE], the group's own
  const u8 *weight, *x;
  int apart, there;  // bytes from piece to piece; pieces in which the thread's token exists
  u32 by, codes[PIECES];

  __device__ Scales(float* memory, int group) : held(memory + group * (2 * PIECES * TILE)) {}

  __device__ __forceinline__ void start(const u8* weight_scale, const u8* x_scale, const Sizes& s, Place at, int first) {
    const int own = at.row / (s.rows / s.groups) * s.blocks, wide = s.groups * s.blocks;
    const int token = at.token + threadIdx.x % GROUP;
    weight = weight_scale + static_cast<i64>(at.row / TILE) * s.blocks + first;
    x = x_scale + static_cast<i64>(token) * wide + own + first;
    apart = wide * TILE, there = token < s.tokens ? (s.tokens - token + TILE - 1) / TILE : 0;
    load();
  }
  // Those of the next 128 columns on their way.
  __device__ __forceinline__ void load() {
    by = *weight++;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) codes[piece] = piece < there ? x[piece * apart] : 0;
    x++;
  }
  __device__ __forceinline__ float* of(int turn, int piece) const {
    return held + (turn % 2 * PIECES + piece) * TILE;
  }
  // What was loaded becomes visible to the group, and the next is loaded if there is `more`.
  __device__ __forceinline__ void hand_over(int turn, bool more, int group) {
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
      of(turn, piece)[scale_place(threadIdx.x % GROUP)] = ue8m0_float(codes[piece]) * ue8m0_float(by);
    if (more) load();
    meet_group(group);
  }
};

// Weights and tokens of tile after tile, each by a thread of another warp.
template <int PIECES>
__device__ __forceinline__ void feed(Ring<PIECES> ring, const TensorMap& weight, const TensorMap& x, const Sizes& s,
                                     const Walk<PIECES * TILE>& each) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group_rows = s.rows / s.groups;
  if (warp == 0 && lane == 0)
    each([&](Place at, int b) {
      ring.await_empty();
      ring.full[ring.stage].arrive_expecting(PIECE);
      copy_box(ring.weights(), weight, b * TILE, at.row, ring.full[ring.stage]);
      ring.next();
    });
  pdl_wait();
  if (warp == 1 && lane == 0)
    each([&](Place at, int b) {
      ring.await_empty();
      ring.full[ring.stage].arrive_expecting(PIECES * PIECE);
      const int column = (at.row / group_rows * s.blocks + b) * TILE;
      copy_box(ring.tokens(), x, column, at.token, ring.full[ring.stage]);
      ring.next();
    });
  __syncwarp();
}
