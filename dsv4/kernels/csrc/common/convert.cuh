// Between FP32 and the narrow formats: BF16, E4M3, E2M1, UE8M0. All round to nearest even.
//
// The functions `*_bits` are integer code and run anywhere. The device has instructions for BF16 and E4M3, and for E2M1
// from sm_100a on; the functions without `_bits` use them. Both give the same bits for every FP32 number:
//
//     BF16   overflow to infinity, NaN -> 0x7FFF
//     E4M3   saturates at +-448 (infinities too), NaN -> 0x7F
//     E2M1   saturates at +-6 (infinities too); it has no NaN, and NaN becomes 6 or -6
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

__device__ __forceinline__ u32 e4m3_bits(float x) {
  const u32 bits = __float_as_uint(x), sign = bits >> 24 & 0x80;
  if ((bits & ~SIGN) > INFINITY_BITS) return E4M3_NAN;
  const float size = fminf(__uint_as_float(bits & ~SIGN), 448.0f);
  // Under 2^-6 the step is 2^-9, which is that of FP32 at 2^14: the sum's lowest bits are the code.
  const u32 code = size < 0x1p-6f ? __float_as_uint(size + 0x1p14f) - __float_as_uint(0x1p14f)
                                  : rounded_mantissa<3>(__float_as_uint(size)) - ((127 - 7) << 3);
  return sign | code;
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

__device__ __forceinline__ u32 e4m3(float x) { return e4m3x2(x, 0.0f) & 0xFF; }

__device__ __forceinline__ float e4m3_float(u32 byte) {
  const float size =
      (byte & 0x7F) == E4M3_NAN ? __uint_as_float(0x7FFFFFFFu) : __uint_as_float((byte & 0x7F) << 20) * 0x1p120f;
  return __uint_as_float(__float_as_uint(size) | (byte & 0x80) << 24);
}

__device__ __forceinline__ u32 e2m1_bits(float x) {
  const u32 bits = __float_as_uint(x);
  const float size = fminf(__uint_as_float(bits & ~SIGN), 6.0f);
  // Under 2 the step is a half, which is that of FP32 at 2^22.
  const u32 small = __float_as_uint(size + 0x1p22f) - __float_as_uint(0x1p22f);
  const u32 large = rounded_mantissa<1>(__float_as_uint(size)) - ((127 - 1) << 1);
  return (bits >> 28 & 8) | (size < 2.0f ? small : large);
}

// Eight E2M1 numbers in a word, the first in the lowest nibble.
__device__ __forceinline__ u32 e2m1x8(const float (&x)[8]) {
#ifdef HAS_E2M1_INSTRUCTION
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
      : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]));
  return word;
#else
  u32 word = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) word |= e2m1_bits(x[i]) << 4 * i;
  return word;
#endif
}

// 2^(byte - 127), and NaN for 255. Byte 0 is a subnormal number.
__device__ __forceinline__ float ue8m0_float(u32 byte) {
  if (byte == UE8M0_NAN) return __uint_as_float(0x7FFFFFFFu);
  return byte ? __uint_as_float(byte << 23) : 0x1p-127f;
}
