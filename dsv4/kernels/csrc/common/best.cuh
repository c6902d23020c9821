// The k best of many numbers by whole warps, the largest first, the lowest index among equals.
//
// A number and its index are one key of 64 bits, so that keys order as candidates do and no two are equal. NaN counts as
// minus infinity, both zeros are one number. Key 0 is below all of these: nobody.
#pragma once
#include "common/reduce.cuh"

__device__ __forceinline__ u32 order_key(float x) {
  const float clean = (x == x ? x : __uint_as_float(SIGN | INFINITY_BITS)) + 0.0f;  // which makes -0 the other zero
  const u32 bits = __float_as_uint(clean);
  return bits ^ (static_cast<u32>(static_cast<int>(bits) >> 31) | SIGN);
}

__device__ __forceinline__ u64 best_key(float x, u32 index) {
  return static_cast<u64>(order_key(x)) << 32 | ~index;
}

__device__ __forceinline__ u32 key_index(u64 key) { return ~static_cast<u32>(key); }

// By its upper half, and by the lower one among those of the same: one instruction each.
__device__ __forceinline__ u64 warp_best(u64 key) {
  const u32 upper = static_cast<u32>(key >> 32), top = group_max<32>(upper);
  return static_cast<u64>(top) << 32 | group_max<32>(upper == top ? static_cast<u32>(key) : 0);
}

// `take(i, key)` for the i-th best of all keys of the warp, i = 0 .. k - 1, in every lane; the keys are used up.
template <int M, class Take>
__device__ __forceinline__ void each_best(u64 (&keys)[M], int k, Take take) {
#pragma unroll 1
  for (int i = 0; i < k; i++) {
    u64 top = keys[0];
#pragma unroll
    for (int m = 1; m < M; m++) top = keys[m] > top ? keys[m] : top;
    top = warp_best(top);
    take(i, top);
#pragma unroll
    for (int m = 0; m < M; m++) keys[m] = keys[m] == top ? 0 : keys[m];
  }
}
