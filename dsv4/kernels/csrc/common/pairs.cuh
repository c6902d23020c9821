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

// What a lane of half of a warp, or of half of a group of lanes, goes on with: it has two, hands one on, and joins the
// other with what it is handed. So a butterfly over many values gets by with half of the exchanges at each step.
template <class T, class Join>
__device__ __forceinline__ T halved(T lower, T upper, int other, int lane, Join join) {
  const bool above = lane & other;
  const T given = __shfl_xor_sync(ALL_LANES, above ? lower : upper, other);
  return join(above ? upper : lower, given);
}

// COUNT numbers a lane, COUNT a power of two, joined over LANES neighbouring lanes in the order of a butterfly. Lane l ends
// with number l % LANES / (LANES / COUNT).
template <int LANES, int COUNT, class T, class Join>
__device__ __forceinline__ T butterflies(T (&of)[COUNT], int lane, Join join) {
  int other = LANES / 2;
#pragma unroll
  for (int half = COUNT / 2; half; half /= 2, other /= 2)
#pragma unroll
    for (int i = 0; i < half; i++) of[i] = halved(of[i], of[i + half], other, lane, join);
#pragma unroll
  for (; other; other /= 2) of[0] = join(of[0], __shfl_xor_sync(ALL_LANES, of[0], other));
  return of[0];
}
