// BF16 numbers two to a word, the first in the low half: one instruction does the work of two.
#pragma once
#include "common/reduce.cuh"

__device__ __forceinline__ float low_float(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// Both low halves, and both high halves.
__device__ __forceinline__ u32 low_halves(u32 a, u32 b) {
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, 0x5410);
#else
  return (a & 0xFFFFu) | b << 16;
#endif
}

__device__ __forceinline__ u32 high_halves(u32 a, u32 b) {
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, 0x7632);
#else
  return a >> 16 | (b & 0xFFFF0000u);
#endif
}

// Of each two numbers the one of larger magnitude, with any sign. NaN comes last.
__device__ __forceinline__ u32 larger_pair(u32 a, u32 b) {
#ifdef __CUDA_ARCH__
  u32 top;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(top) : "r"(a), "r"(b));
  return top;
#else
  const u32 low = max(a & 0x7FFFu, b & 0x7FFFu), high = max(a & 0x7FFF0000u, b & 0x7FFF0000u);
  return high | low;
#endif
}

// Of eight numbers that are two to a word, likewise.
__device__ __forceinline__ u32 largest_pair(const Raw8<bf16>& of) {
  return larger_pair(larger_pair(of.words.x, of.words.y), larger_pair(of.words.z, of.words.w));
}

// Each product rounded once.
__device__ __forceinline__ u32 product_pair(u32 a, u32 b) {
#ifdef __CUDA_ARCH__
  u32 found;
  asm("mul.bf16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
  return found;
#else
  return bf16x2(low_float(a) * low_float(b), high_float(a) * high_float(b));
#endif
}

// Four bytes of E4M3 as BF16, times `by` and 2^-120, unless one is NaN: the bits of a size, moved, are those of BF16 for a
// number 2^120 times as small.
__device__ __forceinline__ uint2 e4m3_pairs(u32 four, u32 by) {
  const u32 upper = (four & 0x80808080u) | (four >> 4 & 0x07070707u), lower = four << 4 & 0xF0F0F0F0u;
  return make_uint2(product_pair(__byte_perm(lower, upper, 0x5140), by), product_pair(__byte_perm(lower, upper, 0x7362), by));
}

// Whose upper bits are set: bytes of E4M3 that are NaN, and perhaps others if there is one. Adding one to each byte changes
// the upper bit of one that is NaN, and of no other unless a NaN below has carried.
__device__ __forceinline__ u32 e4m3_changed(const uint4& codes) {
  constexpr u32 ONE = 0x01010101u;
  return ((codes.x + ONE) ^ codes.x) | ((codes.y + ONE) ^ codes.y) | ((codes.z + ONE) ^ codes.z) | ((codes.w + ONE) ^ codes.w);
}

// Two sums over the warp, each in the order of `warp_sum`: the first in the lower lanes, the second in the upper ones. So
// the exchanges of one do for both.
__device__ __forceinline__ float both_sums(const float (&of)[2], int lane) {
  const bool upper = lane & 16;
  float sum = (upper ? of[1] : of[0]) + __shfl_xor_sync(ALL_LANES, upper ? of[0] : of[1], 16);
#pragma unroll
  for (int other = 8; other; other >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, other);
  return sum;
}
