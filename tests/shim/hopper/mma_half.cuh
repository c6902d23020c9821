// In place of csrc/common/mma_half.cuh on the host: the lanes of a warp lay down their registers, and each takes what is
// its own. Written from the layouts of the PTX manual, mma.m16n8k16.
#pragma once
#include "common/half.cuh"

inline void mma_half(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high) {
  static float laid[1024][12];
  const int lane = threadIdx.x % 32, first = static_cast<int>(threadIdx.x) - lane;
  const u32 words[6] = {a[0], a[1], a[2], a[3], b_low, b_high};
  for (int i = 0; i < 12; i++) laid[threadIdx.x][i] = half_float(words[i / 2] >> 16 * (i % 2) & 0xFFFF);
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const int half = i / 2, row = lane / 4, n = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; k++) {
      const int holder = k % 8 / 2, upper = k / 8;
      sum += static_cast<double>(laid[first + 4 * row + holder][4 * upper + 2 * half + k % 2]) *
             laid[first + 4 * n + holder][8 + 2 * upper + k % 2];
    }
    d[i] = static_cast<float>(sum);
  }
  __syncwarp();
}
