// y = x W^T in FP32, for any widths: the form of what the tensor cores do not take, FP32 operands above all.
//
// Moves   the weights once for four tokens.
// Form    a warp has a row of weights and up to four tokens: eight columns a lane, chunk after chunk, added as they come,
//         then a butterfly over the lanes. Products of BF16 are exact in FP32. Nothing depends on the number of tokens.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/reduce.cuh"

constexpr int TOKENS = 4;

template <class X, class W>
__device__ __forceinline__ void matmul(
    const X* x, i64 stride, const W* weight, float* y, int rows, int columns, int tokens, int row_blocks) {
  pdl_trigger();
  const int row = blockIdx.x % row_blocks * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = blockIdx.x / row_blocks * TOKENS, count = min(TOKENS, tokens - first);
  const W* const from = weight + static_cast<i64>(row < rows ? row : 0) * columns;
  const bool wide = aligned(weight, static_cast<i64>(columns) * static_cast<int>(sizeof(W)), 16);
  const bool wide_x = aligned(x, stride * static_cast<int>(sizeof(X)), 16);
  float sum[TOKENS] = {};
  pdl_wait();
#pragma unroll 1
  for (int column = lane * EIGHT; column < columns; column += WARP_COLUMNS) {
    float w[8];
    widen(load8(from + column, columns - column, wide), w);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      if (t >= count) continue;
      float v[8];
      widen(load8(x + (first + t) * stride + column, columns - column, wide_x), v);
#pragma unroll
      for (int i = 0; i < 8; i++) sum[t] = fmaf(w[i], v[i], sum[t]);
    }
  }
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const float all = warp_sum(sum[t]);
    if (lane == 0 && row < rows && t < count) y[static_cast<i64>(first + t) * rows + row] = all;
  }
}

#define MATMUL(X, W)                                                                                              \
  extern "C" __global__ void __launch_bounds__(256) matmul_##X##_##W(                                             \
      const X* x, i64 stride, const W* weight, float* y, int rows, int columns, int tokens, int row_blocks) {     \
    matmul(x, stride, weight, y, rows, columns, tokens, row_blocks);                                              \
  }

MATMUL(bf16, bf16)
MATMUL(bf16, float)
MATMUL(float, bf16)
MATMUL(float, float)
