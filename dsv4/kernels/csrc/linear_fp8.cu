// y = x W^T for a few tokens: E4M3 weights with a UE8M0 scale for 128 x 128, E4M3 tokens with one for 128.
//
// Moves   the weights once; all else is small.
// Floor   at 3.0 TB/s: 11.3 us for 33.6 MB.
// Measured on an H100, one token: 11.5 us (wq_b), 12.7 (wo_b), 3.9 for 8.4 MB (w2): about 1.5 us are start and end. LOG.md.
// Form    64 rows of weights are the M side of a tensor core's product and the tokens its N side. A cluster has a tile of
//         64 rows at a time, each of its blocks a segment of the columns; the sums of 128 columns are scaled and added in
//         FP32, column by column, then segment by segment. A row's bits are its own, whatever the tokens beside it.
//         Where groups of rows have columns of their own of every token, a cluster stays within a group.
//
// Weights are read as they lie in a checkpoint, in boxes of 64 rows x 128 columns (dsv4/kernels/tiles.py).
//
// arch: sm_90a
#include "common/linear_few.cuh"

#define LINEAR_FP8(T, NT)                                                                                             \
  extern "C" __global__ void __launch_bounds__(160) linear_fp8_##T##_##NT(                                            \
      const __grid_constant__ TensorMap weight, const u8* weight_scale, const u8* x, const u8* x_scale, T* y,         \
      int tiles, int blocks, int tokens, int groups, int stages) {                                                    \
    e4m3_few::linear_fp8<NT, T>({weight, weight_scale, x, x_scale, y, tiles, blocks, tokens, groups, stages}, whole()); \
  }

LINEAR_FP8(bf16, 8)
LINEAR_FP8(bf16, 16)
LINEAR_FP8(bf16, 32)
LINEAR_FP8(float, 8)
LINEAR_FP8(float, 16)
LINEAR_FP8(float, 32)
