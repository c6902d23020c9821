// Tiles of 128 or 256 tokens and 128 rows of FP8 weights: tokens are the M side of the products, 64 a group of four warps.
// Two groups multiply, scale and add; four more warps feed them.
#pragma once
#include "common/formats.cuh"
#include "common/wgmma.cuh"

constexpr int TILE = 128;             // rows, tokens of a piece, columns
constexpr int PIECE = TILE * TILE;    // bytes
constexpr int FEEDERS = 128, GROUP = 128, CONSUMERS = 2 * GROUP;  // threads
constexpr int GROUP_TOKENS = 64, D = 64;                          // of a group's product; its sums in a thread
constexpr int MOST_STAGES = 8;

struct Sizes {
  int rows, tokens, blocks, segments;
};

// What changes the time alone. across: blocks of a cluster side by side on tokens, which share weights. group: tiles of
// tokens that are taken together, for all rows.
struct Plan {
  int stages, across, group;
};

struct Place {
  int row, token;
};

// The tiles of the clusters, each `down` x `across` tiles of blocks.
template <int TOKENS>
struct Tiles {
  int down, across, high, wide, group;

  __device__ Tiles(const Sizes& s, int down, int across, int group)
      : down(down), across(across), high((s.rows + down * TILE - 1) / (down * TILE)),
        wide((s.tokens + across * TOKENS - 1) / (across * TOKENS)), group(group) {}
  __device__ int count() const { return high * wide; }
  __device__ Place operator()(int tile, int rank) const {
    const int first = tile / (group * high) * group, rest = tile - first * high, width = min(group, wide - first);
    return {(rest / width * down + rank / across) * TILE, ((first + rest % width) * across + rank % across) * TOKENS};
  }
};

// The blocks of columns from `first` to `last` of every tile of one block of a cluster.
template <int TOKENS>
struct Walk {
  const Tiles<TOKENS>& tiles;
  int cluster, clusters, rank, first, last;

  template <class Visit>
  __device__ __forceinline__ void operator()(Visit visit) const {
    for (int tile = cluster; tile < tiles.count(); tile += clusters) {
      const Place at = tiles(tile, rank);
      for (int b = first; b < last; b++) visit(at, b);
    }
  }
};

// Stages of 128 columns each: weights, tokens, and for each token the product of both scales.
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

// Of 128 columns the products of a group's tokens and 128 rows, from zero; they are under way when it returns.
__device__ __forceinline__ void start(float (&part)[D], const u8* tokens, const u8* weights) {
  const u64 a = operand(tokens), b = operand(weights);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++) wgmma(part, a + 2 * k, b + 2 * k, k);
  wgmma_commit();
}

// The scales of the two tokens that a thread has, eight apart, of those of its group.
__device__ __forceinline__ float2 scales_of(const float* scales) {
  const float* const from = scales + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  return {from[0], from[8]};
}

__device__ __forceinline__ void promote(float (&sum)[D], const float (&part)[D], float2 s) {
#pragma unroll
  for (int i = 0; i < D; i++) sum[i] = fmaf(part[i], i & 2 ? s.y : s.x, sum[i]);
}

// Weights, tokens and scales of tile after tile, each by other warps.
template <int PIECES>
__device__ __forceinline__ void feed(Ring<PIECES> ring, const TensorMap& weight, const TensorMap& x, const u8* weight_scale,
                                     const u8* x_scale, const Sizes& s, const Walk<PIECES * TILE>& each) {
  const Tiles<PIECES * TILE>& tiles = each.tiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, size = tiles.down * tiles.across;
  const int i = each.rank / tiles.across, j = each.rank % tiles.across;
  if (warp == 0 && lane == 0) {
    const u32 beside = ((1u << tiles.across) - 1) << i * tiles.across;  // the blocks that have our rows
    const int part = TILE / tiles.across;
    each([&](Place at, int b) {
      ring.await_empty();
      ring.full[ring.stage].arrive_expecting(PIECE);
      u8* const to = ring.weights() + j * part * ROW_BYTES;
      copy_box_to(to, weight, b * TILE, at.row + j * part, ring.full[ring.stage], tiles.across > 1 ? beside : 0);
      ring.next();
    });
  }
  pdl_wait();
  if (warp == 1 && lane == 0) {
    u32 below = 0;  // the blocks that have our tokens
    for (int r = j; r < size; r += tiles.across) below |= 1u << r;
    const int part = PIECES * TILE / tiles.down;
    each([&](Place at, int b) {
      ring.await_empty();
      ring.full[ring.stage].arrive_expecting(PIECES * PIECE);
      u8* const to = ring.tokens() + i * part * ROW_BYTES;
      copy_box_to(to, x, b * TILE, at.token + i * part, ring.full[ring.stage], tiles.down > 1 ? below : 0);
      ring.next();
    });
  }
  if (warp >= 2) {
    int turn = 0;
    each([&](Place at, int b) {
      if ((turn++ & 1) == (warp & 1)) {
        const int row = min(at.row, s.rows - 1) / TILE;  // of a tile beyond the last too
        const float by = ue8m0_float(weight_scale[static_cast<i64>(row) * s.blocks + b]);
#pragma unroll 1
        for (int piece = 0; piece < PIECES; piece++) {
          const int token = at.token + piece * TILE + lane;
          const u8* from = x_scale + static_cast<i64>(token) * s.blocks + b;
          float found[4];
#pragma unroll
          for (int q = 0; q < 4; q++, from += 32 * s.blocks)
            found[q] = token + 32 * q < s.tokens ? ue8m0_float(*from) * by : 0.0f;
          if (piece == 0) ring.await_empty();
          float* const to = ring.scales() + piece * TILE + lane;
#pragma unroll
          for (int q = 0; q < 4; q++) to[32 * q] = found[q];
        }
        __syncwarp();
        if (lane == 0) ring.full[ring.stage].arrive();
      }
      ring.next();
    });
  }
  __syncwarp();
}
