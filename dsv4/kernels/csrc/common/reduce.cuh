// Reductions in an order that belongs to the row and not to the launch: whatever the number of warps, the same bits.
//
// The sum of a row is taken over chunks of 256 columns. In a lane its eight columns ascending, then a butterfly over the
// 32 lanes, then the chunks ascending, from zero. Columns past the row's end count as zeros.
#pragma once
#include "common/vector.cuh"

// Every lane gets the same bits: at each step both lanes of a pair add the same two numbers.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int other = 16; other; other >>= 1) v += __shfl_xor_sync(ALL_LANES, v, other);
  return v;
}

// The same of 32 numbers of which each of eight neighbours has four: of lanes l, l + 8, l + 16 and l + 24 of the butterfly.
__device__ __forceinline__ float eight_sum(const float (&v)[4]) {
  float sum = (v[0] + v[2]) + (v[1] + v[3]);
#pragma unroll
  for (int other = 4; other; other >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, other);
  return sum;
}

// The largest of LANES neighbouring lanes, of magnitudes as bits: these order as the numbers do, and NaN comes last.
template <int LANES>
__device__ __forceinline__ u32 group_max(u32 v) {
#ifdef __CUDA_ARCH__
  constexpr bool WHOLE = LANES == 32;
#else
  constexpr bool WHOLE = false;  // the host has no instruction for it
#endif
  if constexpr (WHOLE) {
    asm volatile("redux.sync.max.u32 %0, %0, 0xFFFFFFFF;" : "+r"(v));
  } else {
#pragma unroll
    for (int other = LANES / 2; other; other >>= 1) {
      const u32 found = __shfl_xor_sync(ALL_LANES, v, other);
      v = found > v ? found : v;
    }
  }
  return v;
}

__device__ __forceinline__ u32 magnitude(float x) { return __float_as_uint(x) & ~SIGN; }

__device__ __forceinline__ u32 largest(const float (&v)[8]) {
#ifdef __CUDA_ARCH__
  float top = fabsf(v[0]);
#pragma unroll
  for (int i = 1; i < 8; i++) asm("max.NaN.f32 %0, %0, %1;" : "+f"(top) : "f"(fabsf(v[i])));
  return __float_as_uint(top);
#else
  u32 top = 0;
  for (int i = 0; i < 8; i++) top = magnitude(v[i]) > top ? magnitude(v[i]) : top;
  return top;
#endif
}

__device__ __forceinline__ float square_sum(const float (&v)[8]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) sum = fmaf(v[i], v[i], sum);
  return sum;
}

__device__ __forceinline__ float ordered_sum(const float* parts, int count) {
  float sum = 0;
#pragma unroll 8
  for (int i = 0; i < count; i++) sum += parts[i];
  return sum;
}

// 1 / sqrt(sum / n + eps), each step rounded as IEEE says.
__device__ __forceinline__ float rms_factor(float sum, int n, float eps) {
  return 1.0f / sqrtf(sum / static_cast<float>(n) + eps);
}
