// Index vectors, keys and queries: 128 numbers on sixteen lanes of a warp, eight on each. Bytes: dsv4/quant/index_keys.py.
#pragma once
#include "common/formats.cuh"
#include "common/vector.cuh"

namespace index_vectors {

constexpr int DIMS = 128, LANES = DIMS / EIGHT;

// In Sylvester's order: at each step numbers that are so far apart become their sum and their difference.
__device__ __forceinline__ void hadamard(float (&v)[8], int lane) {
#pragma unroll
  for (int apart = 1; apart < EIGHT; apart *= 2)
#pragma unroll
    for (int j = 0; j < EIGHT; j++)
      if (!(j & apart)) {
        const float x = v[j], y = v[j | apart];
        v[j] = x + y, v[j | apart] = x - y;
      }
#pragma unroll
  for (int apart = 1; apart < LANES; apart *= 2)
#pragma unroll
    for (int j = 0; j < EIGHT; j++) {
      const float other = __shfl_xor_sync(ALL_LANES, v[j], apart);
      v[j] = lane & apart ? other - v[j] : v[j] + other;
    }
#pragma unroll
  for (int j = 0; j < EIGHT; j++) v[j] *= 0.08838834764f;  // 128^-1/2
  rounded8<bf16>(v);
}

// E2M1 per 32 and UE8M0 scales: 64 + 4 bytes. A column of DIMS or more is nobody's.
struct Fp4 {
  static constexpr int BYTES = 64;
  __device__ static void store(const float (&v)[8], int column, u8* data, u8* scales) {
    Mxfp4<bf16>::store(v, 1.0f, {data, scales, DIMS}, 0, column);
  }
};

// E4M3 and one scale, the same power of two as FP32: 128 + 4 bytes.
struct Fp8 {
  static constexpr int BYTES = 128;
  __device__ static void store(const float (&v)[8], int column, u8* data, u8* scales) {
    const u32 amax = group_max<LANES>(largest(v)), byte = Fp8Row::scale_byte(amax);
    const bool broken = amax >= INFINITY_BITS;
    u32 low = 0, high = 0;
    if (!broken) Fp8Row::codes(v, byte, low, high);
    if (column < DIMS) *reinterpret_cast<uint2*>(data + column) = make_uint2(low, high);
    if (column == 0) *reinterpret_cast<u32*>(scales) = broken ? 0x7FC00000u : byte << 23;
  }
};

}  // namespace index_vectors
