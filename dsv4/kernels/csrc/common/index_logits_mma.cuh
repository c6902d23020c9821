// What a warp makes of 32 keys by mma.sync: how they and queries lie in shared memory and in lanes.
//
// Lane 4 g + t multiplies keys g and g + 8 of a tile with heads 2 t and 2 t + 1 of eight.
#pragma once
#include "common/index_logits.cuh"
#include "common/mma_half.cuh"

namespace index_logits {

constexpr int TILES = 2, WARP_KEYS = 16 * TILES, WARPS = 4, THREADS = 32 * WARPS;
constexpr int KEYS = WARPS * WARP_KEYS;              // of a stage
constexpr int OPERANDS = HEADS / 8 * STEPS / 2 * 32;  // of a token's queries, 16 bytes each
template <class L>
constexpr int STAGES = L::PIECES == 1 ? 4 : 3;

// Of a piece of a key, in a stage: no two of eight lanes meet in a bank.
template <class L>
__device__ __forceinline__ int place(int key, int piece) {
  return key * L::BYTES + 16 * (L::PIECES == 1 ? piece : piece ^ (key & 1) * 4);
}

// Over the lanes of a key.
__device__ __forceinline__ float over_lanes(float sum) {
  sum += __shfl_xor_sync(ALL_LANES, sum, 1);
  return sum + __shfl_xor_sync(ALL_LANES, sum, 2);
}

// What a lane has of a warp's keys: operands of rows g and g + 8 of each tile, and the factor of key 8 t + g.
struct Keys {
  u32 a[TILES][STEPS][4];
  float factor;
};

template <class L>
__device__ __forceinline__ void load(Keys& keys, const u8* stage, int first, int g, int t) {
  u32 by[2 * TILES];
  const u32* const scales = reinterpret_cast<const u32*>(stage + KEYS * L::BYTES) + first;
  u32 of[2 * TILES];
#pragma unroll
  for (int i = 0; i < 2 * TILES; i++) of[i] = scales[8 * i + g];
  L::multipliers(by, keys.factor, of, scales[8 * t + g], t);
#pragma unroll
  for (int i = 0; i < 2 * TILES; i++) {
    uint4 pieces[L::PIECES];
#pragma unroll
    for (int j = 0; j < L::PIECES; j++)
      pieces[j] = *reinterpret_cast<const uint4*>(stage + place<L>(first + 8 * i + g, L::piece(t, j)));
    u32 wide[2 * STEPS];
    L::widen(wide, pieces, by[i]);
#pragma unroll
    for (int s = 0; s < STEPS; s++) keys.a[i / 2][s][i % 2] = wide[2 * s], keys.a[i / 2][s][2 + i % 2] = wide[2 * s + 1];
  }
}

// Lane t's part of the query of a head, to where the lanes look.
template <class L>
__device__ __forceinline__ void lay(uint4* operands, const uint4 (&pieces)[L::PIECES], u32 scales, int head, int t) {
  u32 wide[2 * STEPS];
  L::widen(wide, pieces, L::multiplier(scales, t));
#pragma unroll
  for (int p = 0; p < STEPS / 2; p++)
    operands[(head / 8 * STEPS / 2 + p) * 32 + head % 8 * 4 + t] =
        make_uint4(wide[4 * p], wide[4 * p + 1], wide[4 * p + 2], wide[4 * p + 3]);
}

// The logit of key 8 t + g of the warp's. `weights`: half those of the token's heads, each times the factor of its query.
__device__ __forceinline__ float logit(const Keys& keys, const uint4* operands, const float* weights, int heads,
                                       int lane) {
  const int t = lane % 4;
  float sum[TILES][2] = {};
#pragma unroll 1
  for (int j = 0; 8 * j < heads; j += 2) {  // sixteen heads at once: four chains of products
    float d[2][TILES][4] = {};
#pragma unroll
    for (int p = 0; p < STEPS / 2; p++) {
      uint4 b[2];
#pragma unroll
      for (int h = 0; h < 2; h++) b[h] = operands[((j + h) * STEPS / 2 + p) * 32 + lane];
#pragma unroll
      for (int n = 0; n < 2 * TILES; n++) mma_half(d[n % 2][n / 2], keys.a[n / 2][2 * p], b[n % 2].x, b[n % 2].y);
#pragma unroll
      for (int n = 0; n < 2 * TILES; n++) mma_half(d[n % 2][n / 2], keys.a[n / 2][2 * p + 1], b[n % 2].z, b[n % 2].w);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float2 w = *reinterpret_cast<const float2*>(weights + 8 * (j + h) + 2 * t);
#pragma unroll
      for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[m][i / 2] = fmaf(twice_relu(d[h][m][i]), i % 2 ? w.y : w.x, sum[m][i / 2]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * TILES; i++) sum[i / 2][i % 2] = over_lanes(sum[i / 2][i % 2]);
  const float low = t & 1 ? sum[0][1] : sum[0][0], high = t & 1 ? sum[1][1] : sum[1][0];
  return (t & 2 ? high : low) * keys.factor;
}

}  // namespace index_logits
