// E2M1 and E4M3 as FP16 numbers, two to a word, exactly.
#pragma once
#include "common/convert.cuh"

__device__ __forceinline__ float half_float(u32 bits) {
  const u32 size = bits & 0x7FFFu;
  const float wide = size < 0x7C00u ? __uint_as_float(size << 13) * 0x1p112f : __uint_as_float(size << 13 | INFINITY_BITS);
  return __uint_as_float(__float_as_uint(wide) | (bits & 0x8000u) << 16);
}

// Two products, of which none is NaN.
__device__ __forceinline__ u32 half_products(u32 a, u32 b) {
#ifdef __CUDA_ARCH__
  u32 pair;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
#else
  return halfx2(half_float(a & 0xFFFFu) * half_float(b & 0xFFFFu), half_float(a >> 16) * half_float(b >> 16));
#endif
}

// Both bytes of the lower half, the first in front.
__device__ __forceinline__ u32 e4m3_halves(u32 two) {
#ifdef __CUDA_ARCH__
  u32 pair;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %1;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "}"
      : "=r"(pair)
      : "r"(two));
  return pair;
#else
  u32 pair = 0;
  for (int i = 0; i < 2; i++) {
    const u32 byte = two >> 8 * i & 255;
    pair |= ((byte & 0x7F) == E4M3_NAN ? 0x7FFFu : half_bits(e4m3_float(byte))) << 16 * i;
  }
  return pair;
#endif
}

constexpr float E2M1_HALVES = 0x1p-14f;  // of the numbers that `e2m1_halves` makes, before they are multiplied

// Eight codes become four words, times E2M1_HALVES times `by` (twice the same FP16 number): even codes, then odd ones. A
// code in the upper half of a byte is an FP16 number once its size is three places lower: the same two bits of exponent.
__device__ __forceinline__ void e2m1_halves(u32 (&to)[4], u32 word, u32 by) {
  const u32 odd = (word & 0x80808080u) | (word >> 3 & 0x0E0E0E0Eu);
  const u32 even = (word << 4 & 0x80808080u) | (word << 1 & 0x0E0E0E0Eu);
  to[0] = half_products(__byte_perm(even, 0, 0x1404), by), to[1] = half_products(__byte_perm(even, 0, 0x3424), by);
  to[2] = half_products(__byte_perm(odd, 0, 0x1404), by), to[3] = half_products(__byte_perm(odd, 0, 0x3424), by);
}
