// y = x W^T for many BF16 tokens, with the weights and the bits of matmul_few.cu.
//
// Moves   the weights once for NT tokens, the tokens once for all tiles of weights, through the second cache.
// Floor   8,192 tokens at 600 TFLOP/s (what mma.sync reaches): 0.29 ms for 2,624 x 4096, 0.03 ms for the router, 0.92 ms
//         for Flash's wo_a.
// Form    a block has a tile of rows and NT tokens. Eight warps share the tile out; a thread of the first keeps a ring
//         of boxes (as wide as one of weights) filled. Order of sums: common/mma.cuh.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/weights.cuh"

constexpr int WORKERS = 256, MOST_STAGES = 16;

struct Sizes {
  int rows, columns, tokens, tiles, groups, stages;
};

// A warp has 16 M rows and 8 N tokens; ROW_WARPS of them share the rows of the tile, the others its tokens.
template <int M, int N, int ROW_WARPS, class W, class T>
__device__ __forceinline__ void matmul_many(const TensorMap& weight, const u8* scale, const TensorMap& x, T* y,
                                            const Sizes& s) {
  DYNAMIC_SHARED(__align__(1024) u8, memory);
  __shared__ Barrier full[MOST_STAGES], empty[MOST_STAGES];
  constexpr int R = 16 * M * ROW_WARPS, NT = 8 * N * (8 / ROW_WARPS), WEIGHTS = R * BOX_BYTES, APART = NT * BOX_BYTES;
  constexpr int STAGE = WEIGHTS + W::X_BOXES * APART;
  const int boxes = (s.columns + W::COLUMNS - 1) / W::COLUMNS;
  const int row = blockIdx.x % s.tiles * R, start = blockIdx.x / s.tiles * NT;
  const int column = row / (s.rows / s.groups) * s.columns * 2;  // bytes of a token that are other groups'
  const i64 scales = static_cast<i64>(row / SCALE_ROWS) * boxes;
  pdl_trigger();
  if (threadIdx.x == 0) {
    for (int i = 0; i < s.stages; i++) full[i].init(1), empty[i].init(WORKERS / 32);
    fence_barriers();
  }
  __syncthreads();
  const bool feeds = threadIdx.x == 0;  // a thread of a warp that works too: nine warps would have fewer registers each
  const int early = min(s.stages, boxes);
  const auto bring = [&](int stage, int box) {
#pragma unroll
    for (int q = 0; q < W::X_BOXES; q++)
      copy_box(memory + stage * STAGE + WEIGHTS + q * APART, x, column + (box * W::X_BOXES + q) * BOX_BYTES, start,
               full[stage]);
  };
  if (feeds)  // weights are on their way before x is there
    for (int i = 0; i < early; i++) {
      full[i].arrive_expecting(STAGE);
      copy_box(memory + i * STAGE, weight, i * BOX_BYTES, row, full[i]);
    }
  pdl_wait();
  if (feeds)
    for (int i = 0; i < early; i++) bring(i, i);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int own_rows = warp % ROW_WARPS * 16 * M, own_tokens = warp / ROW_WARPS * 8 * N;
  float sum[M][N][4] = {}, d[M][N][4] = {}, next = W::scale(scale, scales);
  int stage = 0, round = 0, given = 0, freed = 0;  // `given`, in round `freed`: the stage of the last turn
  for (int i = 0; i < boxes; i++) {
    if (feeds && i && i - 1 + s.stages < boxes) {  // what was read in the last turn is filled again
      const int box = i - 1 + s.stages;
      empty[given].wait(freed & 1);
      full[given].arrive_expecting(STAGE);
      copy_box(memory + given * STAGE, weight, box * BOX_BYTES, row, full[given]);
      bring(given, box);
    }
    given = stage, freed = round;
    const float by = next;
    next = W::scale(scale, scales + min(i + 1, boxes - 1));
    const u8* const w = memory + stage * STAGE + own_rows * BOX_BYTES;
    const u8* const v = memory + stage * STAGE + WEIGHTS + own_tokens * BOX_BYTES;
    full[stage].wait(round & 1);
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
      for (int j = 0; j < W::X_BOXES; j++) {
        uint4 low[M], high[M];
#pragma unroll
        for (int m = 0; m < M; m++) {
          const uint4 one = W::piece(w, 16 * m + g, t, h), other = W::piece(w, 16 * m + g + 8, t, h);
          low[m] = W::eight(one, j, W::broken(one, one)), high[m] = W::eight(other, j, W::broken(other, other));
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
          const uint4 b = W::tokens(v, APART, 8 * n + g, t, h, j);
#pragma unroll
          for (int m = 0; m < M; m++) mma(d[m][n], low[m], high[m], b);
        }
      }
    }
    __syncwarp();
    if (lane == 0) empty[stage].arrive();
    if (++stage == s.stages) stage = 0, round++;
    if (i % W::CHAIN == W::CHAIN - 1 || i == boxes - 1) {
#pragma unroll
      for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
          for (int e = 0; e < 4; e++) sum[m][n][e] += d[m][n][e] * by, d[m][n][e] = 0;
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
        if (at < s.tokens && r < s.rows) y[static_cast<i64>(at) * s.rows + r] = narrow<T>(sum[m][n][e]);
      }
    }
  }
}

#define MATMUL_MANY(NAME, M, N, ROW_WARPS, W, T)                                                                  \
  extern "C" __global__ void __launch_bounds__(256, M > 1 ? 1 : 3) NAME(                                          \
      const __grid_constant__ TensorMap weight, const u8* scale, const __grid_constant__ TensorMap x, T* y,       \
      int rows, int columns, int tokens, int tiles, int groups, int stages) {                                     \
    matmul_many<M, N, ROW_WARPS, W, T>(weight, scale, x, y, {rows, columns, tokens, tiles, groups, stages});      \
  }
#define FORMS(NAME, W, T)                  \
  MATMUL_MANY(NAME##_16, 1, 1, 4, W, T)    \
  MATMUL_MANY(NAME##_32, 1, 2, 4, W, T)    \
  MATMUL_MANY(NAME##_64, 1, 4, 4, W, T)    \
  MATMUL_MANY(NAME##_128, 2, 8, 4, W, T)

FORMS(matmul_many, Bf16Weights, float)
FORMS(grouped_many_bf16, Bf16Weights, bf16)
FORMS(grouped_many_e4m3, E4m3Weights, bf16)
