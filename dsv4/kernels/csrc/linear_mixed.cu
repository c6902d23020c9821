// Two matrices that share an input, in one launch: BF16 rows times BF16 tokens, E4M3 rows times the same tokens quantised.
//
// Moves   the weights once; all else is small.
// Floor   at 3.0 TB/s: 9.3 us for the input of a ratio-4 layer of Flash (21.5 MB of BF16, 6.3 MB of E4M3).
// Form    some blocks do what those of csrc/linear_fp8.cu do, in clusters, the others what those of csrc/matmul_few.cu do, bit
//         for bit. The bytes of all are asked for at once.
//
// arch: sm_90a
#include "common/linear_few.cuh"
#include "common/matmul_few.cuh"

// The first `stored_blocks` blocks take the E4M3 matrix.
extern "C" __global__ void __launch_bounds__(288, 2)
    linear_mixed(const __grid_constant__ TensorMap stored, const u8* scale, const u8* x8, const u8* x_scale, bf16* y8,
                 int tiles, int blocks, int stored_stages, const __grid_constant__ TensorMap dense, const bf16* x, i64 stride,
                 float* y, int rows, int columns, int dense_stages, int tokens, int stored_blocks) {
  const int block = blockIdx.x, all = gridDim.x;
  if (block < stored_blocks) {
    e4m3_few::linear_fp8<8, bf16>({stored, scale, x8, x_scale, y8, tiles, blocks, tokens, 1, stored_stages},
                                  {block, stored_blocks});
  } else {
    bf16_few::matmul_few<16, Bf16Weights, float>(dense, nullptr, x, stride, y,
                                                 {rows, columns, tokens, 1, 1, dense_stages},
                                                 {block - stored_blocks, all - stored_blocks});
  }
}
