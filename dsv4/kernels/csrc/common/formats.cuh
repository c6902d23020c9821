// Eight values of a row become stored bytes. The rules: dsv4/quant/rows.py.
//
// Lane l holds columns 8 l .. 8 l + 7, zeros past the row's end; whole warps call `store` together. LANES neighbours share
// a scale. A block with a number that is not finite gets the NaN scale and zeros.
#pragma once
#include "common/reduce.cuh"

// Where rows of n columns go. The stride of the scales is the number of blocks of a row.
struct Stored {
  u8* data;
  u8* scale;
  int n;
};

// FP8_ROW: E4M3 bytes, UE8M0 of 128 columns (64 in a cache row). s = 2^ceil(log2(max(amax, 1e-4) / 448)).
template <int COLUMNS>
struct Fp8 {
  static constexpr int BLOCK = COLUMNS, LANES = COLUMNS / EIGHT;
  static constexpr bool GLOBAL = false;  // whether there is a second scale over all blocks

  // The scale's byte. Adding `1 - 1.75` of a mantissa carries just where amax has more than 1.75 = 448 / 256 of its
  // binade. The floor 448 * 2^-22 has the scale of 1e-4.
  __device__ static u32 scale_byte(u32 amax) {
    const u32 floor = __float_as_uint(448.0f * 0x1p-22f);
    return (((amax > floor ? amax : floor) + 0x1FFFFFu) >> 23) - 8;
  }

  // A division by a power of two, as a product with its exact reciprocal.
  __device__ static void codes(const float (&v)[8], u32 byte, u32& low, u32& high) {
    const float inverse = __uint_as_float((254 - byte) << 23);
    low = e4m3x2(v[0] * inverse, v[1] * inverse) | e4m3x2(v[2] * inverse, v[3] * inverse) << 16;
    high = e4m3x2(v[4] * inverse, v[5] * inverse) | e4m3x2(v[6] * inverse, v[7] * inverse) << 16;
  }

  __device__ static void store(const float (&v)[8], float, const Stored& to, int row, int column) {
    const u32 amax = group_max<LANES>(largest(v));
    const bool broken = amax >= INFINITY_BITS;
    const u32 byte = scale_byte(amax);
    u32 low = 0, high = 0;
    if (!broken) codes(v, byte, low, high);
    if (column >= to.n) return;
    store_bytes(to.data + static_cast<i64>(row) * to.n + column, low, high, to.n - column, aligned(to.data, to.n, 8));
    const int blocks = (to.n + BLOCK - 1) / BLOCK;
    if (column % BLOCK == 0) to.scale[static_cast<i64>(row) * blocks + column / BLOCK] = broken ? UE8M0_NAN : byte;
  }
};
using Fp8Row = Fp8<128>;

__device__ __forceinline__ void store_nibbles(const Stored& to, int row, int column, u32 word) {
  const u32 width = static_cast<u32>(to.n) / 2;
  u8* const p = to.data + static_cast<i64>(row) * width + static_cast<u32>(column) / 2;
  if (aligned(to.data, width, 4) && column + EIGHT <= to.n) {
    *reinterpret_cast<u32*>(p) = word;
  } else {
#pragma unroll 1
    for (int i = 0; i < 4 && column + 2 * i < to.n; i++, word >>= 8) p[i] = static_cast<u8>(word);
  }
}

// MXFP4: E2M1 nibbles, UE8M0 of 32 columns. s = 2^ceil(log2(max(amax, 6 * 2^-126) / 6)). T: which the numbers are of.
template <class T>
struct Mxfp4 {
  static constexpr int BLOCK = 32, LANES = BLOCK / EIGHT;
  static constexpr bool GLOBAL = false;

  __device__ static u32 scale_byte(u32 amax) {  // as for FP8, with 6 = 1.5 * 4
    const u32 floor = __float_as_uint(6.0f * 0x1p-126f);
    return (((amax > floor ? amax : floor) + 0x3FFFFFu) >> 23) - 2;
  }

  __device__ static void store(const float (&v)[8], float, const Stored& to, int row, int column) {
    const u32 amax = group_max<LANES>(largest(v));
    const bool broken = amax >= INFINITY_BITS;
    const u32 byte = scale_byte(amax);
    const float inverse = __uint_as_float((254 - byte) << 23) * E2M1_UNIT<sizeof(T) == 2>;
    float scaled[8];
#pragma unroll
    for (int i = 0; i < 8; i++) scaled[i] = v[i] * inverse;
    const u32 word = broken ? 0 : e2m1x8<sizeof(T) == 2>(scaled, scaled);
    if (column >= to.n) return;
    store_nibbles(to, row, column, word);
    const int blocks = (to.n + BLOCK - 1) / BLOCK;
    if (column % BLOCK == 0) to.scale[static_cast<i64>(row) * blocks + column / BLOCK] = broken ? UE8M0_NAN : byte;
  }
};

// 1 / x rounded to nearest, for sizes from 2^-100 to 2^100: IEEE division without its branches.
__device__ __forceinline__ float rounded_reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(-fmaf(x, y, -1.0f), y, y);
#else
  return 1.0f / x;
#endif
}

// x / by, rounded as IEEE division rounds, given the rounded reciprocal: two corrections of x * (1 / by), each by the exact
// remainder (Markstein; the second makes a quotient that is off by less than a unit correct). Nothing may overflow.
__device__ __forceinline__ float quotient(float x, float by, float reciprocal) {
  float q = x * reciprocal;
  q = fmaf(fmaf(q, -by, x), reciprocal, q);
  return fmaf(fmaf(q, -by, x), reciprocal, q);
}

// x / step times E2M1_UNIT<false> for many x, such that E2M1 makes of it what it makes of the quotient that IEEE division rounds,
// but for the sign of a zero: corrected once. Around every tie that is right for all 2^23 mantissas of a step.
// step: from 2^-80 to 2^100; x: up to 2^20 of them.
struct Divisor {
  float step, reciprocal;

  __device__ explicit Divisor(float by)
      : step(by * (1.0f / E2M1_UNIT<false>)), reciprocal(rounded_reciprocal(by) * E2M1_UNIT<false>) {}

  __device__ float operator()(float x) const {
    const float q = x * reciprocal;
    return fmaf(fmaf(-q, step, x), reciprocal, q);
  }
};

// NVFP4: E2M1 nibbles, E4M3 of 16 columns, times a global scale `total`. s = E4M3(amax / 6 / total), at least 2^-9.
struct Nvfp4 {
  static constexpr int BLOCK = 16, LANES = BLOCK / EIGHT;
  static constexpr bool GLOBAL = true;

  // The largest magnitude of a lane's block.
  __device__ static u32 block_max(const float (&v)[8]) { return group_max<LANES>(largest(v)); }

  // As the row's own scale counts it: a broken block counts as zeros.
  __device__ static u32 counted(u32 amax) { return amax >= INFINITY_BITS ? 0 : amax; }

  __device__ static void store(const float (&v)[8], float total, const Stored& to, int row, int column) {
    store(v, block_max(v), total, to, row, column);
  }

  __device__ static void store(const float (&v)[8], u32 amax, float total, const Stored& to, int row, int column) {
    const bool broken = amax >= INFINITY_BITS;
    float x[8], size = __uint_as_float(amax), sixth = quotient(size, 6.0f, 1.0f / 6.0f);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = v[i];
    float lift = 1.0f, by = total;
    constexpr u32 LEAST = (127 - 60) << 23, MOST = (127 + 60) << 23;  // 2^-60 and 2^60
    if (__float_as_uint(total) - LEAST > MOST - LEAST) {
      // A power of two brings scales of unusual size to where no division can overflow or lose bits.
      lift = total < 1.0f ? 0x1p64f : 0x1p-64f, by *= lift;
      sixth = size / 6.0f * lift, size *= lift;
#pragma unroll
      for (int i = 0; i < 8; i++) x[i] *= lift;
    }
    const float stored = fmaxf(quotient(fminf(sixth, by * 512.0f), by, rounded_reciprocal(by)), 0x1p-9f);
    const u32 byte = e4m3(stored);
    const float step = e4m3_size(byte) * total;  // what the reader multiplies by
    const float lifted = fminf(step * lift, 0x1p100f);
    u32 kept = byte;
    // Numbers that a given scale is much too small for, infinities and NaN: a branch of the whole warp.
    if (__any_sync(ALL_LANES, !(size <= lifted * 0x1p20f))) {
#pragma unroll
      for (int i = 0; i < 8; i++) x[i] = broken ? 0.0f : fmaxf(fminf(x[i], lifted * 8.0f), lifted * -8.0f);
      kept = broken ? E4M3_NAN : byte;
    }
    const Divisor over(lifted);
    float scaled[8];
#pragma unroll
    for (int i = 0; i < 8; i++) scaled[i] = over(x[i]);
    const u32 word = e2m1x8<false>(scaled, x);
    if (column >= to.n) return;
    store_nibbles(to, row, column, word);
    const u32 blocks = static_cast<u32>(to.n + BLOCK - 1) / BLOCK;
    if (column % BLOCK == 0) to.scale[static_cast<i64>(row) * blocks + static_cast<u32>(column) / BLOCK] = kept;
  }
};

// The global scale under which `amax` is the largest number: amax / 2688, and 1 for zero.
__device__ __forceinline__ float nvfp4_global(u32 amax) {
  return amax ? fmaxf(quotient(__uint_as_float(amax), 2688.0f, 1.0f / 2688.0f), 0x1p-126f) : 1.0f;
}
