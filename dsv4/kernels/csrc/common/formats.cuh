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
  const int width = to.n / 2;
  u8* const p = to.data + static_cast<i64>(row) * width + column / 2;
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
    const float inverse = __uint_as_float((254 - byte) << 23) * E2M1_UNIT;
    float scaled[8];
#pragma unroll
    for (int i = 0; i < 8; i++) scaled[i] = v[i] * inverse;
    const u32 word = broken ? 0 : e2m1x8<sizeof(T) == 2>(scaled);
    if (column >= to.n) return;
    store_nibbles(to, row, column, word);
    const int blocks = (to.n + BLOCK - 1) / BLOCK;
    if (column % BLOCK == 0) to.scale[static_cast<i64>(row) * blocks + column / BLOCK] = broken ? UE8M0_NAN : byte;
  }
};

// x / step times E2M1_UNIT for many x, at most 6 units in size, such that E2M1 makes of it what it makes of the quotient
// that IEEE division rounds, without its branches: x * (1 / step), corrected once by the exact remainder. Around every tie
// that is right for all 2^23 mantissas of a step, given that its reciprocal is rounded to nearest.
// step: positive. Powers of two bring it near 1, so that no step of the computation overflows or loses bits.
struct Divisor {
  float up, down, step, reciprocal, top;

  __device__ explicit Divisor(float by) {
    const float scale = by < 0x1p-64f ? 0x1p64f : 1.0f;
    const u32 exponent = __float_as_uint(by * scale) >> 23;
    up = scale * E2M1_UNIT;
    down = __uint_as_float((254 - min(exponent, 253u)) << 23);
    step = by * scale * down;
    reciprocal = 1.0f / step;
    top = 6.0f * E2M1_UNIT * step;
  }

  __device__ float operator()(float x) const {
    const float a = fminf(fabsf(x) * up * down, top), q = a * reciprocal;
    return copysignf(fmaf(fmaf(-q, step, a), reciprocal, q), x);  // -0 / step
  }
};

// NVFP4: E2M1 nibbles, E4M3 of 16 columns, times a global scale `total`. s = E4M3(amax / 6 / total), at least 2^-9.
struct Nvfp4 {
  static constexpr int BLOCK = 16, LANES = BLOCK / EIGHT;
  static constexpr bool GLOBAL = true;

  __device__ static void store(const float (&v)[8], float total, const Stored& to, int row, int column) {
    const u32 amax = group_max<LANES>(largest(v));
    const bool broken = amax >= INFINITY_BITS;
    const float stored = fmaxf(__uint_as_float(amax) / 6.0f / total, 0x1p-9f);
    const u32 byte = e4m3(stored);
    const float step = e4m3_float(byte) * total;  // what the reader multiplies by
    const Divisor over(step);
    float scaled[8];
#pragma unroll
    for (int i = 0; i < 8; i++) scaled[i] = over(v[i]);
    const u32 word = broken ? 0 : e2m1x8<false>(scaled);
    if (column >= to.n) return;
    store_nibbles(to, row, column, word);
    const int blocks = (to.n + BLOCK - 1) / BLOCK;
    if (column % BLOCK == 0) to.scale[static_cast<i64>(row) * blocks + column / BLOCK] = broken ? E4M3_NAN : byte;
  }

  // The largest magnitude of a lane's block as the row's own scale counts it: a broken block counts as zeros.
  __device__ static u32 amax(const float (&v)[8]) {
    const u32 top = group_max<LANES>(largest(v));
    return top >= INFINITY_BITS ? 0 : top;
  }
};

// The global scale under which `amax` is the largest number: amax / 2688, and 1 for zero.
__device__ __forceinline__ float nvfp4_global(u32 amax) {
  return amax ? fmaxf(__uint_as_float(amax) / 2688.0f, 0x1p-126f) : 1.0f;
}
