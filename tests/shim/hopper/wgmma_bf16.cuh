// In place of csrc/common/wgmma_bf16.cuh on the host: 128 threads lay down their registers, and each sums its own numbers.
// Written from the layouts of the PTX manual: rows, columns and registers of a warpgroup's product of BF16.
#pragma once
#include "common/pairs.cuh"
#include "common/wgmma.cuh"

// Number k of 16 of a row that lies in shared memory.
inline float laid_number(u64 operand, int row, int k) {
  const u8* const tile = reinterpret_cast<const u8*>(operand & ~15ull);
  const int byte = 32 * static_cast<int>((operand & 15) / 2) + 2 * k;
  return bf16_float(*reinterpret_cast<const u16*>(tile + row * ROW_BYTES + 16 * (byte / 16 ^ row % 8) + byte % 16));
}

template <bool TURNED, int D, class Row>
void sum_products(float (&d)[D], u64 b, int add, Row row_number) {
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < D; i++) {
    const int row = lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
    double sum = add ? d[i] : 0.0;
    for (int k = 0; k < 16; k++)
      sum += static_cast<double>(row_number(row, k)) * (TURNED ? laid_number(b, k, n) : laid_number(b, n, k));
    d[i] = static_cast<float>(sum);
  }
}

template <int D>
void wgmma_bf16(float (&d)[D], u64 a, u64 b, int add) {
  const int first = threadIdx.x % 128 / 32 * 16;
  sum_products<false>(d, b, add, [&](int row, int k) { return laid_number(a, first + row, k); });
}

template <int D>
void wgmma_bf16_turned(float (&d)[D], const u32 (&a)[4], u64 b, int add) {
  static u32 laid[16 * 1024][4];
  const int group = threadIdx.x / 128, own = simt::cluster_rank() * 1024 + threadIdx.x, first = own - own % 32;
  for (int i = 0; i < 4; i++) laid[own][i] = a[i];
  meet<128>(8 + group);
  sum_products<true>(d, b, add, [&](int row, int k) {
    const u32 word = laid[first + row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
    return k % 2 ? high_float(word) : low_float(word);
  });
  meet<128>(8 + group);
}
