// Tiles of 128 rows of FP8 weights and 128 or 256 tokens: what linear_fp8_wide.cu and linear_fp8_split.cu share. Two groups
// of four warps have 64 rows each; four more warps feed them.
#pragma once
#include "common/formats.cuh"
#include "common/wgmma.cuh"

constexpr int TILE = 128;             // rows, tokens of a piece, columns
constexpr int PIECE = TILE * TILE;    // bytes
constexpr int FEEDERS = 128, GROUP = 128, CONSUMERS = 2 * GROUP;  // threads
constexpr int GROUP_ROWS = 64, D = 64;                            // of a group's product; its sums in a thread
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
          float* const to = ring.scales() + piece * TILE + scale_place(lane);
#pragma unroll
          for (int q = 0; q < 4; q++) to[q * scale_place(32)] = found[q];
        }
        __syncwarp();
        if (lane == 0) ring.full[ring.stage].arrive();
      }
      ring.next();
    });
  }
  __syncwarp();
}
