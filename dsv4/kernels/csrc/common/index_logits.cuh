// Logits of index keys: how keys and queries lie in shared memory and in lanes, and what a warp makes of 32 keys.
//
// Lane 4 g + t multiplies keys g and g + 8 of a tile with heads 2 t and 2 t + 1 of eight. The order of columns in a sum is free
// as long as keys and queries have the same: a lane has 32 columns of a vector that lie together, or twice 16.
#pragma once
#include "common/half.cuh"
#include "common/mma_half.cuh"

namespace index_logits {

constexpr int HEADS = 64, STEPS = 8, TILES = 2, WARP_KEYS = 16 * TILES, WARPS = 4, THREADS = 32 * WARPS;
constexpr int KEYS = WARPS * WARP_KEYS;              // of a stage
constexpr int OPERANDS = HEADS / 8 * STEPS / 2 * 32;  // of a token's queries, 16 bytes each

// Bits of a word: in each byte that is 0 the highest, and maybe some above.
__device__ __forceinline__ u32 zero_bytes(u32 word) { return (word - 0x01010101u) & ~word & 0x80808080u; }

// E2M1 under a UE8M0 scale for 32: lane t has block t.
struct Fp4 {
  static constexpr int BYTES = 64, STAGES = 4, PIECES = 1;

  __device__ static int place(int key, int piece) { return key * BYTES + 16 * piece; }
  __device__ static int piece(int t, int) { return t; }

  // A lane's numbers of a vector as FP16, and what the sums have to be multiplied by. The highest scale of the four counts
  // as 2, the others as what they are to it: exactly, down to 2^-24 of it. Below, numbers are rounded to that, and zeros
  // below 2^-29.
  __device__ static void widen(u32 (&to)[2 * STEPS], float& factor, const uint4 (&from)[PIECES], u32 scales, int t) {
    const u32 low = scales & 0x00FF00FFu, high = scales >> 8 & 0x00FF00FFu;
    const u32 top = max(max(low & 0xFFFFu, low >> 16), max(high & 0xFFFFu, high >> 16));
    const u32 below = top - (scales >> 8 * t & 255), by = below < 30 ? (30 - below) << 10 : 0;
    const u32 words[4] = {from[0].x, from[0].y, from[0].z, from[0].w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 four[4];
      e2m1_halves(four, words[i], by << 16 | by);
#pragma unroll
      for (int j = 0; j < 4; j++) to[4 * i + j] = four[j];
    }
    factor = ue8m0_float(top) * 0.5f;
  }
};

// E4M3 under one FP32 scale: lane t has pieces t and t + 4.
struct Fp8 {
  static constexpr int BYTES = 128, STAGES = 3, PIECES = 2;

  __device__ static int place(int key, int piece) { return key * BYTES + 16 * (piece ^ (key & 1) * 4); }
  __device__ static int piece(int t, int i) { return t + 4 * i; }

  __device__ static void widen(u32 (&to)[2 * STEPS], float& factor, const uint4 (&from)[PIECES], u32 scale, int) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 words[4] = {from[i].x, from[i].y, from[i].z, from[i].w};
#pragma unroll
      for (int j = 0; j < 4; j++)
        to[8 * i + 2 * j] = e4m3_halves(words[j]), to[8 * i + 2 * j + 1] = e4m3_halves(words[j] >> 16);
    }
    factor = __uint_as_float(scale);
  }
};

// Like the bits of a number that is not negative, zero otherwise; NaN stays.
__device__ __forceinline__ float relu(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < 0.0f ? 0.0f : x;
#endif
}

// Over the lanes of a key.
__device__ __forceinline__ float over_lanes(float sum) {
  sum += __shfl_xor_sync(ALL_LANES, sum, 1);
  return sum + __shfl_xor_sync(ALL_LANES, sum, 2);
}

// What a lane has of a warp's keys: operands, and factors of rows g and g + 8 of each tile.
struct Keys {
  u32 a[TILES][STEPS][4];
  float factor[TILES][2];
};

template <class L>
__device__ __forceinline__ void load(Keys& keys, const u8* stage, int first, int g, int t) {
#pragma unroll
  for (int i = 0; i < 2 * TILES; i++) {
    const int row = first + 8 * i + g;
    uint4 pieces[L::PIECES];
#pragma unroll
    for (int j = 0; j < L::PIECES; j++)
      pieces[j] = *reinterpret_cast<const uint4*>(stage + L::place(row, L::piece(t, j)));
    u32 wide[2 * STEPS];
    L::widen(wide, keys.factor[i / 2][i % 2], pieces, *reinterpret_cast<const u32*>(stage + KEYS * L::BYTES + 4 * row), t);
#pragma unroll
    for (int s = 0; s < STEPS; s++) keys.a[i / 2][s][i % 2] = wide[2 * s], keys.a[i / 2][s][2 + i % 2] = wide[2 * s + 1];
  }
}

// Lane t's part of the query of a head, to where the lanes look. Returns the factor of its sums.
template <class L>
__device__ __forceinline__ float lay(uint4* operands, const uint4 (&pieces)[L::PIECES], u32 scales, int head, int t) {
  u32 wide[2 * STEPS];
  float factor;
  L::widen(wide, factor, pieces, scales, t);
#pragma unroll
  for (int p = 0; p < STEPS / 2; p++)
    operands[(head / 8 * STEPS / 2 + p) * 32 + head % 8 * 4 + t] =
        make_uint4(wide[4 * p], wide[4 * p + 1], wide[4 * p + 2], wide[4 * p + 3]);
  return factor;
}

// The logit of key 8 t + g of the warp's. `weights`: of the token's heads, each times the factor of its query.
__device__ __forceinline__ float logit(const Keys& keys, const uint4* operands, const float* weights, int lane) {
  const int t = lane % 4;
  float sum[TILES][2] = {};
#pragma unroll 1
  for (int j = 0; j < HEADS / 8; j += 2) {  // sixteen heads at once: four chains of products
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
        for (int i = 0; i < 4; i++) sum[m][i / 2] = fmaf(relu(d[h][m][i]), i % 2 ? w.y : w.x, sum[m][i / 2]);
    }
  }
  float found[2 * TILES];
#pragma unroll
  for (int i = 0; i < 2 * TILES; i++) found[i] = over_lanes(sum[i / 2][i % 2]) * keys.factor[i / 2][i % 2];
  const float low = t & 1 ? found[1] : found[0], high = t & 1 ? found[3] : found[2];
  return t & 2 ? high : low;
}

}  // namespace index_logits
