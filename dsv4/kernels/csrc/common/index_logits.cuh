// Formats of index vectors, keys and queries: as FP16 numbers in the registers of four lanes, and what their sums count.
//
// The order of columns in a sum is free as long as keys and queries have the same: a lane has 32 columns of a vector that lie
// together, or twice 16.
#pragma once
#include "common/half.cuh"

namespace index_logits {

constexpr int HEADS = 64, STEPS = 8;  // of 16 columns

struct Stored {
  const u8* pages;
  u32 page_bytes;
  int shift;  // a page has 2^shift keys
  const i64* table;
  i64 per_row;
};

struct Queries {
  const u8 *data, *scales;  // [tokens, heads, ...]
  const float* weights;
  int heads;  // HEADS at most: the others are zeros
};

// E2M1 under a UE8M0 scale for 32: lane t has block t. Its numbers are multiplied by a power of two on their way to FP16,
// and the sums of a vector by `factor`. Where all four scales are 2^-19 to 2^5 each has a multiplier of its own, exactly.
// Else the highest counts as 2 and the others as what they are to it: exactly, down to 2^-24 of it; below, numbers are
// rounded to that, and zeros below 2^-29.
struct Fp4 {
  static constexpr int BYTES = 64, PIECES = 1;
  static constexpr u32 LEAST = 108, MOST = 132, TWICE = 0x00010001u;
  static constexpr float USUAL = 16;  // factor

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

  // Of a lane's keys, and the factor of its own. The lanes of a key look at a block each.
  template <int N>
  __device__ static void multipliers(u32 (&by)[N], float& factor_of_own, const u32 (&scales)[N], u32 own, int t) {
    bool usual = true;
#pragma unroll
    for (int i = 0; i < N; i++) by[i] = __byte_perm(scales[i], 0, 0x4440 + t), usual &= by[i] - LEAST <= MOST - LEAST;
    if (__all_sync(ALL_LANES, usual)) {
#pragma unroll
      for (int i = 0; i < N; i++) by[i] = usual_multiplier(by[i]);
      factor_of_own = USUAL;
    } else {
      for (int i = 0; i < N; i++) by[i] = multiplier(scales[i], t);
      factor_of_own = factor(own);
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

// Both bytes of the upper half: the instruction takes that half where it is, and `>> 16` would be another.
__device__ __forceinline__ u32 e4m3_upper(u32 four) {
#ifdef __CUDA_ARCH__
  u32 pair;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %1;\n"
      "cvt.rn.f16x2.e4m3x2 %0, high;\n"
      "}"
      : "=r"(pair)
      : "r"(four));
  return pair;
#else
  return e4m3_halves(four >> 16);
#endif
}

// E4M3 under one FP32 scale: lane t has pieces t and t + 4.
struct Fp8 {
  static constexpr int BYTES = 128, PIECES = 2;

  __device__ static int piece(int t, int i) { return t + 4 * i; }

  __device__ static u32 multiplier(u32, int) { return 0; }
  __device__ static float factor(u32 scale) { return __uint_as_float(scale); }
  template <int N>
  __device__ static void multipliers(u32 (&)[N], float& factor_of_own, const u32 (&)[N], u32 own, int) {
    factor_of_own = factor(own);
  }

  __device__ static void widen(u32 (&to)[2 * STEPS], const uint4 (&from)[PIECES], u32) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 words[4] = {from[i].x, from[i].y, from[i].z, from[i].w};
#pragma unroll
      for (int j = 0; j < 4; j++)
        to[8 * i + 2 * j] = e4m3_halves(words[j]), to[8 * i + 2 * j + 1] = e4m3_upper(words[j]);
    }
  }
};

// Adders and multipliers do it, which have room; NaN stays.
__device__ __forceinline__ float twice_relu(float x) { return x + fabsf(x); }

}  // namespace index_logits
