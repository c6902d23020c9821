// y = x W^T for up to eight BF16 tokens a block, summed in FP32: weights as they are stored (BF16, or E4M3 under scales of
// 128 x 128), read once. Groups of rows may have columns of their own of every token.
//
// Moves   the weights once for eight tokens; all else is small.
// Floor   at 3.0 TB/s: 353 us for the head of Flash (1,059 MB), 7.2 us for what shares the input of a ratio-4 layer
//         (2,624 x 4096), 0.7 us for its router.
// Form    a block has R rows of weights at a time and all columns of its tokens in shared memory, those of one group. One
//         thread keeps a ring of slices (four boxes of R rows) filled, in front of the wait for x too; eight warps take
//         slice after slice; what the chains of products gave is added when all of a tile are there. Order of sums:
//         common/mma.cuh; of E4M3 weights each 128 columns are a chain, scaled and added in FP32.
// Why no clusters: blocks of small matrices finish at different times, but what one leaves of the bandwidth the others
//         get, as all of their bytes are asked for at once.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/matmul_few.cuh"

#define MATMUL_FEW(NAME, R, W, T)                                                                            \
  extern "C" __global__ void __launch_bounds__(288, 2) NAME(                                                 \
      const __grid_constant__ TensorMap weight, const u8* scale, const bf16* x, i64 stride, T* y, int rows,  \
      int columns, int tokens, int groups, int parts, int stages) {                                          \
    bf16_few::matmul_few<R, W, T>(weight, scale, x, stride, y, {rows, columns, tokens, groups, parts, stages}, \
                                  whole());                                                                  \
  }

MATMUL_FEW(matmul_few_8, 8, Bf16Weights, float)
MATMUL_FEW(matmul_few_16, 16, Bf16Weights, float)
MATMUL_FEW(grouped_few_bf16, 16, Bf16Weights, bf16)
MATMUL_FEW(grouped_few_e4m3, 16, E4m3Weights, bf16)
