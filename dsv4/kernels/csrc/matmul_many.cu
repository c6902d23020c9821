// y = x W^T in FP32 for many tokens: BF16 weights and tokens, with the bits of matmul_few.cu.
//
// Moves   the weights once for NT tokens, the tokens once for all tiles of weights, through the second cache.
// Floor   8,192 tokens at 600 TFLOP/s (what mma.sync reaches): 0.29 ms for 2,624 x 4096, 0.03 ms for the router.
// Form    a block has a tile of rows and NT tokens. Eight warps share the tile out; a thread of the first keeps a ring
//         of boxes (64 columns of both) filled. Order of sums: common/mma.cuh.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/mma.cuh"

constexpr int WORKERS = 256, MOST_STAGES = 16;

// A warp has 16 M rows and 8 N tokens; ROW_WARPS of them share the rows of the tile, the others its tokens.
template <int M, int N, int ROW_WARPS>
__device__ __forceinline__ void matmul_many(const TensorMap& weight, const TensorMap& x, float* y, int rows, int columns,
                                            int tokens, int tiles, int stages) {
  DYNAMIC_SHARED(__align__(1024) u8, memory);
  __shared__ Barrier full[MOST_STAGES], empty[MOST_STAGES];
  constexpr int R = 16 * M * ROW_WARPS, NT = 8 * N * (8 / ROW_WARPS), WEIGHTS = R * BOX_BYTES;
  constexpr int STAGE = WEIGHTS + NT * BOX_BYTES;
  const int boxes = (columns + BOX_COLUMNS - 1) / BOX_COLUMNS;
  const int row = blockIdx.x % tiles * R, start = blockIdx.x / tiles * NT;
  pdl_trigger();
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; i++) full[i].init(1), empty[i].init(WORKERS / 32);
    fence_barriers();
  }
  __syncthreads();
  const bool feeds = threadIdx.x == 0;  // a thread of a warp that works too: nine warps would have fewer registers each
  const int early = min(stages, boxes);
  if (feeds)  // weights are on their way before x is there
    for (int i = 0; i < early; i++) {
      full[i].arrive_expecting(STAGE);
      copy_box(memory + i * STAGE, weight, i * BOX_BYTES, row, full[i]);
    }
  pdl_wait();
  if (feeds)
    for (int i = 0; i < early; i++) copy_box(memory + i * STAGE + WEIGHTS, x, i * BOX_BYTES, start, full[i]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int own_rows = warp % ROW_WARPS * 16 * M, own_tokens = warp / ROW_WARPS * 8 * N;
  float sum[M][N][4] = {}, d[M][N][4] = {};
  int stage = 0, round = 0, given = 0, freed = 0;  // `given`, in round `freed`: the stage of the last turn
  for (int i = 0; i < boxes; i++) {
    if (feeds && i && i - 1 + stages < boxes) {  // what was read in the last turn is filled again
      const int box = i - 1 + stages;
      u8* const to = memory + given * STAGE;
      empty[given].wait(freed & 1);
      full[given].arrive_expecting(STAGE);
      copy_box(to, weight, box * BOX_BYTES, row, full[given]);
      copy_box(to + WEIGHTS, x, box * BOX_BYTES, start, full[given]);
    }
    given = stage, freed = round;
    const u8* const w = memory + stage * STAGE + own_rows * BOX_BYTES;
    const u8* const v = memory + stage * STAGE + WEIGHTS + own_tokens * BOX_BYTES;
    full[stage].wait(round & 1);
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint4 low[M], high[M];
#pragma unroll
      for (int m = 0; m < M; m++) {
        low[m] = box_piece(w, 16 * m + g, 2 * t + h);
        high[m] = box_piece(w, 16 * m + g + 8, 2 * t + h);
      }
#pragma unroll
      for (int n = 0; n < N; n++) {
        const uint4 b = box_piece(v, 8 * n + g, 2 * t + h);
#pragma unroll
        for (int m = 0; m < M; m++) mma(d[m][n], low[m], high[m], b);
      }
    }
    __syncwarp();
    if (lane == 0) empty[stage].arrive();
    if (++stage == stages) stage = 0, round++;
    if (i % SLICE_BOXES == SLICE_BOXES - 1 || i == boxes - 1) {
#pragma unroll
      for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
          for (int e = 0; e < 4; e++) sum[m][n][e] += d[m][n][e], d[m][n][e] = 0;
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int at = start + own_tokens + 8 * n + 2 * t + e % 2, r = row + own_rows + 16 * m + g + e / 2 * 8;
        if (at < tokens && r < rows) y[static_cast<i64>(at) * rows + r] = sum[m][n][e];
      }
    }
  }
}

#define MATMUL_MANY(NT, M, N, ROW_WARPS)                                                                         \
  extern "C" __global__ void __launch_bounds__(256) matmul_many_##NT(                                            \
      const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x, float* y, int rows,         \
      int columns, int tokens, int tiles, int stages) {                                                          \
    matmul_many<M, N, ROW_WARPS>(weight, x, y, rows, columns, tokens, tiles, stages);                            \
  }

MATMUL_MANY(16, 1, 1, 4)
MATMUL_MANY(32, 1, 2, 4)
MATMUL_MANY(64, 1, 4, 4)
MATMUL_MANY(128, 2, 8, 4)
