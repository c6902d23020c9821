// How the words of a packed quarter of 64 rows (dsv4/quant/packed_formats.py) become what the tensor cores take: E4M3.
#pragma once
#include "common/formats.cuh"
#include "common/wgmma.cuh"

// What a warp that multiplies knows of where it is.
struct Lane {
  int warp, number, g, t;
  __device__ Lane() : warp(threadIdx.x / 32), number(threadIdx.x % 32), g(number / 4), t(number % 4) {}
};

// Of eight bytes the four that the nibbles of `pick` number, none of them above 7: `__byte_perm` would mask them again.
__device__ __forceinline__ u32 picked(u32 low, u32 high, u32 pick) {
#ifdef __CUDA_ARCH__
  u32 found;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(low), "r"(high), "r"(pick));
  return found;
#else
  return __byte_perm(low, high, pick);
#endif
}

// Eight codes become two words of E4M3: the magnitudes pick bytes of the table.
__device__ __forceinline__ void widen8(u32 word, u32 low, u32 high, u32& first, u32& second) {
  const u32 pick = word & 0x77777777u;
  first = picked(low, high, pick) | (word & 0x80808080u);
  second = picked(low, high, pick >> 16) | (word << 4 & 0x80808080u);
}

// The magnitudes of E2M1 times `by`, as E4M3 bytes: what a byte holds (REST 0), or what that leaves (REST 1).
template <int REST>
__device__ __forceinline__ uint2 codes_times(float by) {
  constexpr float codes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float whole = codes[i] * by, head = __uint_as_float(__float_as_uint(whole) & 0xFFF00000u);  // four bits
    v[i] = REST ? whole - head : head;
  }
  return make_uint2(e4m3x2(v[0], v[1]) | e4m3x2(v[2], v[3]) << 16, e4m3x2(v[4], v[5]) | e4m3x2(v[6], v[7]) << 16);
}

// Each format: bytes of a quarter; into how many E4M3 numbers a weight is taken apart; how many scales 128 columns of a row
// have; whether the next words are read AHEAD (it pays where they are widened, and two terms find no room); and `read`: of
// rows 2 g + h of a warp's sixteen the words of 128 columns and the scale of their sum. A tile that stands apart is read
// once for each of its scales, with zeros for the columns of the others.

struct PackedMxfp4 {
  static constexpr int QUARTER = 4352, TERMS = 1, PASSES = 4, ENTRIES = 16, UNIT = 8, NOTHING = 15;
  static constexpr bool AHEAD = true;
  using Entry = uint2;

  // The codes times 2^(step - 8).
  __device__ static Entry entry(int step) {
    return step == NOTHING ? make_uint2(0, 0) : codes_times<0>(__uint_as_float((127 - 8 + step) << 23));
  }

  template <class At>
  __device__ __forceinline__ static void read(At quarter, At table, const Lane& lane, bool apart, int pass,
                                              u32 (&a)[1][4][4], float (&by)[2]) {
    const At data = quarter + 1024 * (lane.warp % 4) + 16 * lane.number;
    const uint2 word = load_shared8(quarter + 4096 + 64 * (lane.warp % 4) + 8 * lane.g);
    int step[2] = {static_cast<int>(word.x >> 4 * lane.t & 15), static_cast<int>(word.y >> 4 * lane.t & 15)};
    by[0] = __uint_as_float(word.x & 0x7F800000u), by[1] = __uint_as_float(word.y & 0x7F800000u);
    if (apart) {  // 32 columns, under their own scale
      step[0] = step[1] = lane.t == pass ? UNIT : NOTHING;
      by[0] = ue8m0_float(word.x >> 8 * pass & 255), by[1] = ue8m0_float(word.y >> 8 * pass & 255);
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const uint4 packed = load_shared16(data + 512 * row);
      const uint2 to = load_shared8(table + 8 * step[row]);
      widen8(packed.x, to.x, to.y, a[0][0][row], a[0][0][2 + row]);
      widen8(packed.y, to.x, to.y, a[0][1][row], a[0][1][2 + row]);
      widen8(packed.z, to.x, to.y, a[0][2][row], a[0][2][2 + row]);
      widen8(packed.w, to.x, to.y, a[0][3][row], a[0][3][2 + row]);
    }
  }
};

// A code times its scale is the sum of two E4M3 numbers, both exact.
struct PackedNvfp4 {
  static constexpr int QUARTER = 4864, TERMS = 2, PASSES = 8, ENTRIES = 89, UNIT = 40, NOTHING = 88;
  static constexpr bool AHEAD = false;
  using Entry = uint4;

  // The codes times (1 + index % 8 / 8) 2^(index / 8 - 5).
  __device__ static Entry entry(int index) {
    if (index == NOTHING) return make_uint4(0, 0, 0, 0);
    const float by = __uint_as_float((127 - 5) * 0x800000 + index * 0x100000);
    const uint2 head = codes_times<0>(by), rest = codes_times<1>(by);
    return make_uint4(head.x, head.y, rest.x, rest.y);
  }

  template <class At>
  __device__ __forceinline__ static void read(At quarter, At table, const Lane& lane, bool apart, int pass,
                                              u32 (&a)[2][4][4], float (&by)[2]) {
    const At data = quarter + 1024 * (lane.warp % 4) + 16 * lane.number;
    const At scales = quarter + 4096 + 128 * (lane.warp % 4) + 16 * lane.g;
    const uint2 common = load_shared8(quarter + 4608 + 64 * (lane.warp % 4) + 8 * lane.g);
    u32 index = load_shared4(scales + 4 * lane.t);  // of row 0 both halves of the columns, then of row 1
    by[0] = __uint_as_float(common.x), by[1] = __uint_as_float(common.y);
    if (apart) {  // 16 columns, under their own scale
      const u32 own = load_shared4(scales + 4 * (pass / 2)) >> 8 * (pass % 2);
      by[0] *= e4m3_float(own & 255), by[1] *= e4m3_float(own >> 16 & 255);
      index = NOTHING * 0x01010101u;
      if (lane.t == pass / 2) index ^= ((UNIT ^ NOTHING) * 0x00010001u) << 8 * (pass % 2);
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const uint4 packed = load_shared16(data + 512 * row);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint4 to = load_shared16(table + (index >> 8 * (2 * row + half) & 127) * 16);
        const u32 words[2] = {half ? packed.z : packed.x, half ? packed.w : packed.y};
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int k = 2 * half + i;
          widen8(words[i], to.x, to.y, a[0][k][row], a[0][k][2 + row]);
          widen8(words[i], to.z, to.w, a[1][k][row], a[1][k][2 + row]);
        }
      }
    }
  }
};

struct PackedFp8 {
  static constexpr int QUARTER = 8208, TERMS = 1, PASSES = 1, ENTRIES = 1;
  static constexpr bool AHEAD = false;
  using Entry = uint2;

  __device__ static Entry entry(int) { return make_uint2(0, 0); }

  template <class At>
  __device__ __forceinline__ static void read(At quarter, At, const Lane& lane, bool, int, u32 (&a)[1][4][4],
                                              float (&by)[2]) {
    const At data = quarter + 2048 * (lane.warp % 4) + 16 * lane.number;
    const uint2 scale = load_shared8(quarter + 8192);
    by[0] = __uint_as_float(scale.x), by[1] = __uint_as_float(scale.y);
#pragma unroll
    for (int row = 0; row < 2; row++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint4 words = load_shared16(data + 1024 * row + 512 * half);
        a[0][2 * half][row] = words.x, a[0][2 * half][2 + row] = words.y;
        a[0][2 * half + 1][row] = words.z, a[0][2 * half + 1][2 + row] = words.w;
      }
  }
};
