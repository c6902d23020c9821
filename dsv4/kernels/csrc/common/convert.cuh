// Between FP32 and the narrow formats: BF16, E4M3, E2M1, UE8M0. All round to nearest even.
//
// The functions `*_bits` are integer code and run anywhere. The device has instructions for BF16 and E4M3, and for E2M1
// from sm_100a on; the functions without `_bits` use them. Both give the same bits for every FP32 number:
//
//     BF16   overflow to infinity, NaN -> 0x7FFF
//     E4M3   saturates at +-448 (infinities too), NaN -> 0x7F
//     FP16   of what fits
//     E2M1   saturates at +-6 (infinities too); it has no NaN: NaN becomes anything
//
// Bytes: dsv4/quant/e4m3.py, e2m1.py, e8m0.py.
#pragma once
#include "common/device.cuh"

#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL) || defined(__CUDA_ARCH_FEAT_SM120_ALL)
#define HAS_E2M1_INSTRUCTION 1
#endif

constexpr u32 SIGN = 0x80000000u, INFINITY_BITS = 0x7F800000u;
constexpr u8 UE8M0_NAN = 255, E4M3_NAN = 0x7F;

__device__ __forceinline__ float bf16_float(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ u32 bf16_bits(float x) {
  const u32 bits = __float_as_uint(x);
  if ((bits & ~SIGN) > INFINITY_BITS) return 0x7FFFu;
  return (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
}

// Two BF16 numbers in a word, `low` in the low half.
__device__ __forceinline__ u32 bf16x2(float low, float high) {
#ifdef __CUDA_ARCH__
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return bf16_bits(low) | bf16_bits(high) << 16;
#endif
}

__device__ __forceinline__ float round_bf16(float x) { return bf16_float(bf16x2(x, 0.0f) & 0xFFFFu); }

// The bits of a positive normal number after rounding to a mantissa of KEPT bits; a carry moves the exponent.
template <int KEPT>
__device__ __forceinline__ u32 rounded_mantissa(u32 bits) {
  constexpr int DROPPED = 23 - KEPT;
  return (bits + ((1u << (DROPPED - 1)) - 1) + (bits >> DROPPED & 1)) >> DROPPED;
}

// The code of a positive number in a format of KEPT mantissa bits whose least normal number is 2^LEAST. Below that the
// step is 2^(LEAST - KEPT), which is that of FP32 at `even`: the sum's lowest bits are the code.
template <int KEPT, int LEAST>
__device__ __forceinline__ u32 narrow_bits(float size) {
  const float even = __uint_as_float((127 + 23 + LEAST - KEPT) << 23);
  return size < __uint_as_float((127 + LEAST) << 23)
             ? __float_as_uint(size + even) - __float_as_uint(even)
             : rounded_mantissa<KEPT>(__float_as_uint(size)) - ((126 + LEAST) << KEPT);
}

__device__ __forceinline__ u32 e4m3_bits(float x) {
  const u32 bits = __float_as_uint(x), sign = bits >> 24 & 0x80;
  if ((bits & ~SIGN) > INFINITY_BITS) return E4M3_NAN;
  return sign | narrow_bits<3, -6>(fminf(__uint_as_float(bits & ~SIGN), 448.0f));
}

// Two E4M3 numbers in a half word, `low` in the low byte.
__device__ __forceinline__ u32 e4m3x2(float low, float high) {
#ifdef __CUDA_ARCH__
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return e4m3_bits(low) | e4m3_bits(high) << 8;
#endif
}

// In a whole word, so that nothing is masked again.
__device__ __forceinline__ u32 e4m3(float x) {
#ifdef __CUDA_ARCH__
  u32 byte;
  asm("{\n"
      ".reg .b16 pair;\n"
      "cvt.rn.satfinite.e4m3x2.f32 pair, 0f00000000, %1;\n"
      "mov.b32 %0, {pair, 0};\n"
      "}"
      : "=r"(byte)
      : "f"(x));
  return byte;
#else
  return e4m3x2(x, 0.0f);
#endif
}

// Of a byte that is neither negative nor NaN.
__device__ __forceinline__ float e4m3_size(u32 byte) { return __uint_as_float(byte << 20) * 0x1p120f; }

__device__ __forceinline__ float e4m3_float(u32 byte) {
  const float size = (byte & 0x7F) == E4M3_NAN ? __uint_as_float(0x7FFFFFFFu) : e4m3_size(byte & 0x7F);
  return __uint_as_float(__float_as_uint(size) | (byte & 0x80) << 24);
}

// What numbers are multiplied by before `e2m1x8` narrows them. Without the instruction, those of few bits pass through FP16
// at 2^-14: there its exponents are those of E2M1, and what is below 1 has one step, here as there.
#ifdef HAS_E2M1_INSTRUCTION
template <bool SHORT>
constexpr float E2M1_UNIT = 1.0f;
#else
template <bool SHORT>
constexpr float E2M1_UNIT = SHORT ? 0x1p-14f : 0.5f;
#endif

// x + y cut to [0, 1]; NaN becomes 0.
__device__ __forceinline__ float saturated_sum(float x, float y) {
#ifdef __CUDA_ARCH__
  float sum;
  asm("add.sat.f32 %0, %1, %2;" : "=f"(sum) : "f"(x), "f"(y));
  return sum;
#else
  const float sum = x + y;
  return sum > 0.0f ? fminf(sum, 1.0f) : 0.0f;
#endif
}

// The codes of E2M1 are four steps of a half up to 2, two of one up to 4 and one of two up to 6. So the code of 2 |q| is
// the sum of three cut numbers, each times its steps and rounded by the addition to a number whose last bit is one: ties
// go to the even sum, which is the even code, and what is too large ends at 7. Multipliers and adders do all that, which
// have room where bits are shifted all the time. The code is the sum's lowest bits.
__device__ __forceinline__ u32 e2m1_sum(float q) {
  const float size = fabsf(q);
  float sum = fmaf(saturated_sum(size, 0.0f), 4.0f, 0x1p23f);
  sum = fmaf(saturated_sum(size, -1.0f), 2.0f, sum);
  return __float_as_uint(sum + saturated_sum(size, -2.0f));
}

// FP16 bits of a number below 2^15.
__device__ __forceinline__ u32 half_bits(float x) {
  const u32 bits = __float_as_uint(x);
  return (bits >> 16 & 0x8000) | narrow_bits<10, -14>(__uint_as_float(bits & ~SIGN));
}

__device__ __forceinline__ u32 halfx2(float low, float high) {
#ifdef __CUDA_ARCH__
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return half_bits(low) | half_bits(high) << 16;
#endif
}

template <int BY>
__device__ __forceinline__ u32 shifted_right(u32 word) {
  return BY < 0 ? word << -BY : word >> BY;
}

// Four words of two halves become the codes of one word: pair I holds numbers I and I + 4.
template <int I>
__device__ __forceinline__ u32 e2m1_of_halves(u32 pair) {
  const u32 code = pair + 0x00FF00FFu + (pair >> 9 & 0x00010001u);  // bits 9 to 11 of each half, its sign above
  return (shifted_right<9 - 4 * I>(code) & 0x00070007u << 4 * I) |
         (shifted_right<12 - 4 * I>(code) & 0x00080008u << 4 * I);
}

// Eight E2M1 numbers in a word, the first in the lowest nibble, of numbers times E2M1_UNIT, with the signs of `sign`.
// SHORT: they have at most eleven significant bits, 6 units at most in size, and their own signs.
template <bool SHORT>
__device__ __forceinline__ u32 e2m1x8(const float (&x)[8], const float (&sign)[8]) {
#ifdef HAS_E2M1_INSTRUCTION
  float y[8];
#pragma unroll
  for (int i = 0; i < 8; i++) y[i] = copysignf(x[i], sign[i]);
  u32 word;
  asm("{\n"
      ".reg .b8 a, b, c, d;\n"
      "cvt.rn.satfinite.e2m1x2.f32 a, %2, %1;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b, %4, %3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5;\n"
      "cvt.rn.satfinite.e2m1x2.f32 d, %8, %7;\n"
      "mov.b32 %0, {a, b, c, d};\n"
      "}"
      : "=r"(word)
      : "f"(y[0]), "f"(y[1]), "f"(y[2]), "f"(y[3]), "f"(y[4]), "f"(y[5]), "f"(y[6]), "f"(y[7]));
  return word;
#else
  if constexpr (SHORT) {
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = halfx2(x[i], x[i + 4]);
    return e2m1_of_halves<0>(pairs[0]) | e2m1_of_halves<1>(pairs[1]) | e2m1_of_halves<2>(pairs[2]) |
           e2m1_of_halves<3>(pairs[3]);
  }
  u32 codes = 0, signs = 0;
#pragma unroll
  for (int i = 7; i >= 0; i--) {
    codes = codes * 16 + e2m1_sum(x[i]);
    signs = signs << 4 | __float_as_uint(sign[i]) >> 28;
  }
  return (codes - 0x4B000000u * 0x11u) | (signs & 0x88888888u);
#endif
}

// 2^(byte - 127), and NaN for 255. Byte 0 is a subnormal number.
__device__ __forceinline__ float ue8m0_float(u32 byte) {
  if (byte == UE8M0_NAN) return __uint_as_float(0x7FFFFFFFu);
  return byte ? __uint_as_float(byte << 23) : 0x1p-127f;
}
