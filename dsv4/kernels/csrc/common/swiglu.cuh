// SwiGLU with its clamp.
#pragma once
#include "common/device.cuh"

// 1 / x within a unit of the last place, 0 for infinity, for x whose reciprocal is normal.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// The smaller one, and the larger one; NaN stays NaN, which fminf takes for a number that is missing.
__device__ __forceinline__ float smaller(float x, float y) {
#ifdef __CUDA_ARCH__
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
  return x;
#else
  return x > y ? y : x;
#endif
}

__device__ __forceinline__ float larger(float x, float y) {
#ifdef __CUDA_ARCH__
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
  return x;
#else
  return x < y ? y : x;
#endif
}

// silu(min(gate, limit)) * clamp(up, -limit, limit); limit 0: no clamp.
__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
  if (limit != 0) {
    gate = smaller(gate, limit);
    up = larger(smaller(up, limit), -limit);
  }
  // A sixteenth of the sum has no subnormal reciprocal. Together within 8 units of the last place.
  return gate * 0.0625f * reciprocal(fmaf(expf(-gate), 0.0625f, 0.0625f)) * up;
}
