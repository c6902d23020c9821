// In place of csrc/common/wgmma.cuh on the host: 128 threads lay down their registers, and each sums its own numbers.
// Written from the layouts of the PTX manual: rows, columns and registers of a warpgroup's product of E4M3.
#pragma once
#include "common/convert.cuh"
#include "common/stream.cuh"

constexpr int ROW_BYTES = 128;

// A step of 32 bytes is an addition of 2, which a multiple of 16 has room for.
inline u64 operand_at(u64 tile) { return tile; }
inline u64 operand(const void* tile) { return operand_at(shared_address(tile)); }
inline u64 of_warp(u64 operand) { return operand; }
inline u64 operand_beyond(u64 operand, int bytes) {
  return operand + bytes / ROW_BYTES * ROW_BYTES + bytes % ROW_BYTES / 16;
}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int LEFT>
void wgmma_wait() {}

inline void hold(const u32 (&)[4]) {}

template <int D>
void wgmma(float (&d)[D], const u32 (&a)[4], u64 b, int add) {
  static u32 laid[2048][4];
  const u8* const tile = reinterpret_cast<const u8*>(b & ~15ull);
  const int step = static_cast<int>(b & 15) / 2, group = threadIdx.x / 128, lane = threadIdx.x % 32;
  const int first = static_cast<int>(threadIdx.x) - lane;  // of the warp
  for (int i = 0; i < 4; i++) laid[threadIdx.x][i] = a[i];
  meet<128>(2 + group);
  for (int i = 0; i < D; i++) {
    const int row = lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
    double sum = add ? d[i] : 0.0;
    for (int k = 0; k < 32; k++) {
      const u32 word = laid[first + row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2];
      const int byte = 32 * step + k, place = n * ROW_BYTES + 16 * (byte / 16 ^ n % 8) + byte % 16;
      sum += static_cast<double>(e4m3_float(word >> 8 * (k % 4) & 255)) * e4m3_float(tile[place]);
    }
    d[i] = static_cast<float>(sum);
  }
  meet<128>(2 + group);
}

// Number k of 32 of a row that lies in shared memory.
inline float laid_e4m3(u64 operand, int row, int k) {
  const int byte = 32 * static_cast<int>((operand & 15) / 2) + k;
  const int place = row * ROW_BYTES + 16 * (byte / 16 ^ row % 8) + byte % 16;
  return e4m3_float(reinterpret_cast<const u8*>(operand & ~15ull)[place]);
}

template <int D>
void wgmma(float (&d)[D], u64 a, u64 b, int add) {
  const int lane = threadIdx.x % 32, first = threadIdx.x % 128 / 32 * 16;
  for (int i = 0; i < D; i++) {
    const int row = first + lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
    double sum = add ? d[i] : 0.0;
    for (int k = 0; k < 32; k++) sum += static_cast<double>(laid_e4m3(a, row, k)) * laid_e4m3(b, n, k);
    d[i] = static_cast<float>(sum);
  }
}
