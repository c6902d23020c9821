// Logits of index keys: how keys and queries lie in shared memory and in lanes, and what a warp makes of 32 keys.
//
// Lane 4 g + t multiplies keys g and g + 8 of a tile with heads 2 t and 2 t + 1 of eight. The order of columns in a sum is
// free as long as keys and queries have the same: a lane has 32 columns of a vector that lie together, or twice 16.
#pragma once
#include "common/half.cuh"
#include "common/mma_half.cuh"

namespace index_logits {

constexpr int HEADS = 64, STEPS = 8, TILES = 2, WARP_KEYS = 16 * TILES, WARPS = 4, THREADS = 32 * WARPS;
constexpr int KEYS = WARPS * WARP_KEYS;              // of a stage
constexpr int OPERANDS = HEADS / 8 * STEPS / 2 * 32;  // of a token's queries, 16 bytes each

// E2M1 under a UE8M0 scale for 32: lane t has block t. Its numbers are multiplied by a power of two on their way to FP16,
// and the sums of a vector by `factor`. Where all four scales are 2^-19 to 2^5 each has a multiplier of its own, exactly.
// Else the highest counts as 2 and the others as what they are to it: exactly, down to 2^-24 of it; below, numbers are
// rounded to that, and zeros below 2^-29.
struct Fp4 {
  static constexpr int BYTES = 64, STAGES = 4, PIECES = 1;
  static constexpr u32 LEAST = 108, MOST = 132, TWICE = 0x00010001u;
  static constexpr float USUAL = 16;  // factor

  __device__ static int place(int key, int piece) { return key * BYTES + 16 * piece; }
  __device__ static int piece(int t, int) { return t; }

  __device__ static bool is_usual(u32 scales) {
    const u32 low = scales & 0x00FF00FFu, high = scales >> 8 & 0x00FF00FFu;
    const u32 beyond = (low - LEAST * TWICE) | (high - LEAST * TWICE) | (MOST * TWICE - low) | (MOST * TWICE - high);
    return !(beyond & 0x80008000u);
  }
  __device__ static u32 highest(u32 scales) {
    return max(max(scales & 255, scales >> 8 & 255), max(scales >> 16 & 255, scales >> 24));
  }

  // Twice, as FP16: 2^15 for the highest.
  __device__ static u32 usual_multiplier(u32 scale) { return scale * (TWICE << 10) - (MOST - 30) * (TWICE << 10); }
  __device__ static u32 multiplier(u32 scales, int t) {
    const u32 scale = scales >> 8 * t & 255;
    if (is_usual(scales)) return usual_multiplier(scale);
    const u32 below = highest(scales) - scale;
    return below < 30 ? (30 - below) * (TWICE << 10) : 0;
  }
  __device__ static float factor(u32 scales) { return is_usual(scales) ? USUAL : ue8m0_float(highest(scales)) * 0.5f; }

  // Of the four rows of a lane, and the factor of its own. scales: of the warp's keys.
  __device__ static void multipliers(u32 (&by)[2 * TILES], float& own, const u8* scales, int g, int t) {
    const u32* const words = reinterpret_cast<const u32*>(scales);
    const u32 four = words[8 * t + g];
    if (__all_sync(ALL_LANES, is_usual(four))) {
#pragma unroll
      for (int i = 0; i < 2 * TILES; i++) by[i] = usual_multiplier(scales[4 * (8 * i + g) + t]);
      own = USUAL;
    } else {
      for (int i = 0; i < 2 * TILES; i++) by[i] = multiplier(words[8 * i + g], t);
      own = factor(four);
    }
  }

  __device__ static void widen(u32 (&to)[2 * STEPS], const uint4 (&from)[PIECES], u32 by) {
    const u32 words[4] = {from[0].x, from[0].y, from[0].z, from[0].w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 four[4];
      e2m1_halves(four, words[i], by);
#pragma unroll
      for (int j = 0; j < 4; j++) to[4 * i + j] = four[j];
    }
  }
};

// E4M3 under one FP32 scale: lane t has pieces t and t + 4.
struct Fp8 {
  static constexpr int BYTES = 128, STAGES = 3, PIECES = 2;

  __device__ static int place(int key, int piece) { return key * BYTES + 16 * (piece ^ (key & 1) * 4); }
  __device__ static int piece(int t, int i) { return t + 4 * i; }

  __device__ static u32 multiplier(u32, int) { return 0; }
  __device__ static float factor(u32 scale) { return __uint_as_float(scale); }
  __device__ static void multipliers(u32 (&)[2 * TILES], float& own, const u8* scales, int g, int t) {
    own = reinterpret_cast<const float*>(scales)[8 * t + g];
  }

  __device__ static void widen(u32 (&to)[2 * STEPS], const uint4 (&from)[PIECES], u32) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 words[4] = {from[i].x, from[i].y, from[i].z, from[i].w};
#pragma unroll
      for (int j = 0; j < 4; j++)
        to[8 * i + 2 * j] = e4m3_halves(words[j]), to[8 * i + 2 * j + 1] = e4m3_halves(words[j] >> 16);
    }
  }
};

// Adders and multipliers do it, which have room; NaN stays.
__device__ __forceinline__ float twice_relu(float x) { return x + fabsf(x); }

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
  L::multipliers(by, keys.factor, stage + KEYS * L::BYTES + 4 * first, g, t);
#pragma unroll
  for (int i = 0; i < 2 * TILES; i++) {
    uint4 pieces[L::PIECES];
#pragma unroll
    for (int j = 0; j < L::PIECES; j++)
      pieces[j] = *reinterpret_cast<const uint4*>(stage + L::place(first + 8 * i + g, L::piece(t, j)));
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
