// In place of csrc/common/mma.cuh on the host: the lanes of a warp lay down their registers, and each takes what is its
// own. Written from the layouts of the PTX manual, mma.m16n8k16 and ldmatrix.
#pragma once
#include "common/stream.cuh"
#include "common/vector.cuh"

constexpr int BOX_COLUMNS = 64, BOX_BYTES = 128, SLICE_BOXES = 4;

inline uint4 box_piece(const u8* box, int row, int piece) {
  return *reinterpret_cast<const uint4*>(box + row * BOX_BYTES + 16 * (piece ^ (row & 7)));
}

// What the lanes of this thread's warp laid down.
template <class T>
T* laid_by_warp() {
  static T laid[16 * 1024];
  return laid + simt::cluster_rank() * 1024 + threadIdx.x / 32 * 32;
}

struct Operands {
  float a[8], b[4];
};

inline void mma16(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high) {
  Operands* const laid = laid_by_warp<Operands>();
  const int lane = threadIdx.x % 32;
  const u32 words[6] = {a[0], a[1], a[2], a[3], b_low, b_high};
  for (int i = 0; i < 12; i++)
    (i < 8 ? laid[lane].a[i] : laid[lane].b[i - 8]) = bf16_float(words[i / 2] >> 16 * (i % 2) & 0xFFFF);
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const int half = i / 2, row = lane / 4, n = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; k++) {
      const int holder = k % 8 / 2, upper = k / 8;
      sum += static_cast<double>(laid[4 * row + holder].a[4 * upper + 2 * half + k % 2]) *
             laid[4 * n + holder].b[2 * upper + k % 2];
    }
    d[i] = static_cast<float>(sum);
  }
  __syncwarp();
}

inline void mma(float (&d)[4], const uint4& low, const uint4& high, const uint4& x) {
  mma16(d, {low.x, high.x, low.y, high.y}, x.x, x.y);
  mma16(d, {low.z, high.z, low.w, high.w}, x.z, x.w);
}

template <bool TURNED>
void load_eights(u32 (&to)[4], const void* row) {
  const u16** const laid = laid_by_warp<const u16*>();
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (reinterpret_cast<u64>(row) % 16) simt::fail("a row of a matrix that is not aligned");
  laid[lane] = static_cast<const u16*>(row);
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const u16** const rows = laid + 8 * i;
    const u32 low = TURNED ? rows[2 * t][g] : rows[g][2 * t], high = TURNED ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
    to[i] = low | high << 16;
  }
  __syncwarp();
}
inline void load_matrices(u32 (&to)[4], const void* row) { load_eights<false>(to, row); }
inline void load_turned(u32 (&to)[4], const void* row) { load_eights<true>(to, row); }
