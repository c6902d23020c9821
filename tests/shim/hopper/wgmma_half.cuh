// In place of csrc/common/wgmma_half.cuh on the host: 128 threads lay down their registers, and each sums its own numbers.
// Written from the layouts of the PTX manual: rows, columns and registers of a warpgroup's product of FP16.
#pragma once
#include "common/half.cuh"
#include "common/wgmma.cuh"

template <int D>
void wgmma_half(float (&d)[D], const u32 (&a)[4], u64 b, int add) {
  static float laid[2048][8];
  const u8* const tile = reinterpret_cast<const u8*>(b & ~15ull);
  const int step = static_cast<int>(b & 15) / 2, group = threadIdx.x / 128, lane = threadIdx.x % 32;
  const int first = static_cast<int>(threadIdx.x) - lane;  // of the warp
  for (int i = 0; i < 8; i++) laid[threadIdx.x][i] = half_float(a[i / 2] >> 16 * (i % 2) & 0xFFFF);
  meet<128>(2 + group);
  for (int i = 0; i < D; i++) {
    const int row = lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
    double sum = add ? d[i] : 0.0;
    for (int k = 0; k < 16; k++) {
      const int word = row / 8 + k / 8 * 2, byte = 32 * step + 2 * k;
      const u16 number = *reinterpret_cast<const u16*>(tile + n * ROW_BYTES + 16 * (byte / 16 ^ n % 8) + byte % 16);
      sum += static_cast<double>(laid[first + row % 8 * 4 + k % 8 / 2][2 * word + k % 2]) * half_float(number);
    }
    d[i] = static_cast<float>(sum);
  }
  meet<128>(2 + group);
}
