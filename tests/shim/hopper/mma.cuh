// In place of csrc/common/mma.cuh on the host: a warp's lanes lay down their registers, and each sums its own numbers.
// Written from the layouts of the PTX manual: m16n8k16 of BF16 with FP32 sums.
#pragma once
#include "common/stream.cuh"
#include "common/vector.cuh"

constexpr int BOX_COLUMNS = 64, BOX_BYTES = 128, SLICE_BOXES = 4;

inline uint4 box_piece(const u8* box, int row, int piece) {
  return *reinterpret_cast<const uint4*>(box + row * BOX_BYTES + 16 * (piece ^ (row & 7)));
}

inline void mma_step(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  static u32 laid[1024][6];
  const int lane = threadIdx.x % 32, first = static_cast<int>(threadIdx.x) - lane;
  for (int i = 0; i < 6; i++) laid[threadIdx.x][i] = i < 4 ? a[i] : b[i - 4];
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; k++) {
      const u32 w = laid[first + row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const u32 x = laid[first + n * 4 + k % 8 / 2][4 + k / 8];
      sum += static_cast<double>(bf16_float(w >> 16 * (k % 2) & 0xFFFF)) * bf16_float(x >> 16 * (k % 2) & 0xFFFF);
    }
    d[i] = static_cast<float>(sum);
  }
  __syncwarp();
}

inline void mma(float (&d)[4], const uint4& low, const uint4& high, const uint4& x) {
  mma_step(d, {low.x, high.x, low.y, high.y}, {x.x, x.y});
  mma_step(d, {low.z, high.z, low.w, high.w}, {x.z, x.w});
}
