// Tiles of 128 rows of FP8 weights and 128 or 256 tokens: what linear_fp8_wide.cu and linear_fp8_split.cu share. Two groups
// of four warps have 64 rows each; four more warps feed them.
#pragma once
#include "common/formats.cuh"
#include "common/wgmma.cuh"

constexpr int TILE = 128;             // rows, tokens of a piece, columns
constexpr int PIECE = TILE * TILE;    // bytes
constexpr int FEEDERS = 128, GROUP = 128, CONSUMERS = 2 * GROUP;  // threads
constexpr int GROUP_ROWS = 64, D = 64;                            // of a group's product; its sums in a thread
constexpr int MOST_STAGES = 8, FILLS = 2 + 32;  // who arrives at a full stage: two copies, a warp of scales

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

// Stages of 128 columns each: weights, tokens, and the products of their scales as the threads of a group read them.
template <int PIECES>
struct Ring {
  static constexpr int BYTES = (1 + PIECES) * PIECE, TOKENS = PIECES * TILE;
  Barrier *full, *empty;
  u8* data;
  float* scale;
  int stages, stage = 0;
  u32 parity = 0;

  __device__ u8* weights() const { return data + stage * BYTES; }
  __device__ u8* tokens() const { return data + stage * BYTES + PIECE; }
  __device__ float* scales() const { return scale + stage * TOKENS; }
  __device__ void await_full() const { full[stage].wait(parity); }
  __device__ void await_empty() const { empty[stage].wait(parity ^ 1); }  // true at once the first time
  __device__ void next() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void meet_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); }

// 128 columns of a group's rows times 128 tokens, from zero.
__device__ __forceinline__ void multiply(float (&part)[D], const u8* weights, const u8* tokens) {
  const u64 a = operand(weights), x = operand(tokens);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++) wgmma(part, a + 2 * k, x + 2 * k, k);
  wgmma_commit();
  wgmma_wait<0>();
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

// Weights, tokens and scales of tile after tile, each by other warps.
template <int PIECES>
__device__ __forceinline__ void feed(Ring<PIECES> ring, const TensorMap& weight, const TensorMap& x, const u8* weight_scale,
                                     const u8* x_scale, const Sizes& s, const Walk<PIECES * TILE>& each) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group_rows = s.rows / s.groups, x_blocks = s.groups * s.blocks;
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
  if (warp >= 2) {
    int turn = 0;
    each([&](Place at, int b) {
      if ((turn++ & 1) == (warp & 1)) {
        const float by = ue8m0_float(weight_scale[static_cast<i64>(at.row / TILE) * s.blocks + b]);
        const u8* const first = x_scale + at.row / group_rows * s.blocks + b;
#pragma unroll 1
        for (int piece = 0; piece < PIECES; piece++) {
          const int token = at.token + piece * TILE + lane;
          u32 codes[4];
#pragma unroll
          for (int q = 0; q < 4; q++)
            codes[q] = token + 32 * q < s.tokens ? first[static_cast<i64>(token + 32 * q) * x_blocks] : 0;
          if (piece == 0) ring.await_empty();
          float* const to = ring.scales() + piece * TILE + scale_place(lane);
#pragma unroll
          for (int q = 0; q < 4; q++) to[q * scale_place(32)] = ue8m0_float(codes[q]) * by;
        }
        ring.full[ring.stage].arrive();  // every lane for itself: what it wrote is then seen by whoever waits
      }
      ring.next();
    });
  }
  __syncwarp();
}
