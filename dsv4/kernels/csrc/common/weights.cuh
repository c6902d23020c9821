// Matrices for products of tensor cores in BF16, as they are stored: boxes of 128 bytes a row, and what a lane takes of one.
//
// A box is CHAIN-th of a chain of products from zero; what a chain gives counts `scale` times. Beside a box of weights lie
// X_BOXES boxes of tokens, `apart` bytes from one to the next. In step (h, j) a lane multiplies eight columns. Pieces that may
// be `broken` take longer, and the products of a warp one way.
#pragma once
#include "common/mma.cuh"
#include "common/pairs.cuh"

constexpr int SCALE_ROWS = 128;

// Lane 4 g + t has pieces 2 t and 2 t + 1 of a row, of the weights and of the tokens.
struct Bf16Weights {
  static constexpr int COLUMNS = 64, X_BOXES = 1, CHAIN = SLICE_BOXES;

  __device__ static uint4 piece(const u8* box, int row, int t, int h) { return box_piece(box, row, 2 * t + h); }
  __device__ static bool broken(const uint4&, const uint4&) { return false; }
  __device__ static uint4 eight(const uint4& piece, int, bool) { return piece; }
  __device__ static uint4 tokens(const u8* boxes, int, int row, int t, int h, int) { return box_piece(boxes, row, 2 * t + h); }
  __device__ static float scale(const u8*, i64) { return 1.0f; }
};

// Four bytes of E4M3 as BF16, exactly. broken: whether one may be NaN, which no file should have.
__device__ __forceinline__ uint2 e4m3_bf16(u32 four, bool broken) {
  uint2 v = e4m3_pairs(four, 0x7B807B80u);  // 2^120, twice
  if (broken) {
    const u32 nan = (four & 0x7F7F7F7Fu) + 0x01010101u & 0x80808080u;
    v.x |= (nan & 0x80u ? 0x7FFFu : 0) | (nan & 0x8000u ? 0x7FFF0000u : 0);
    v.y |= (nan & 0x800000u ? 0x7FFFu : 0) | (nan & 0x80000000u ? 0x7FFF0000u : 0);
  }
  return v;
}

// E4M3 under a UE8M0 scale for 128 x 128. A lane has pieces t and t + 4 of a row, sixteen columns each: so no two of its
// tokens' pieces meet in a bank, and of the weights' only two.
struct E4m3Weights {
  static constexpr int COLUMNS = 128, X_BOXES = 2, CHAIN = 1;

  __device__ static uint4 piece(const u8* box, int row, int t, int h) { return box_piece(box, row, t + 4 * h); }
  __device__ static bool broken(const uint4& a, const uint4& b) { return (e4m3_changed(a) | e4m3_changed(b)) & 0x80808080u; }
  __device__ static uint4 eight(const uint4& piece, int j, bool broken) {
    const uint2 low = e4m3_bf16(j ? piece.z : piece.x, broken), high = e4m3_bf16(j ? piece.w : piece.y, broken);
    return make_uint4(low.x, low.y, high.x, high.y);
  }
  __device__ static uint4 tokens(const u8* boxes, int apart, int row, int t, int h, int j) {
    return box_piece(boxes + h * apart, row, 2 * t + j);
  }
  __device__ static float scale(const u8* scales, i64 at) { return ue8m0_float(scales[at]); }
};
