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
#include "common/weights.cuh"

constexpr int NT = 8, WORKERS = 256, MOST_STAGES = 24;

struct Sizes {
  int rows, columns, tokens, groups, parts, stages;  // parts: blocks side by side on tokens
};

// R: 8 or 16 rows of a tile.
template <int R, class W, class T>
__device__ __forceinline__ void matmul_few(const TensorMap& weight, const u8* scale, const bf16* x, i64 stride, T* y,
                                           const Sizes& s) {
  DYNAMIC_SHARED(__align__(1024) u8, memory);
  __shared__ Barrier full[MOST_STAGES], empty[MOST_STAGES];
  constexpr int BOX = R * BOX_BYTES, STAGE = SLICE_BOXES * BOX, CHAINS = SLICE_BOXES / W::CHAIN;  // of a slice
  const int boxes = (s.columns + W::COLUMNS - 1) / W::COLUMNS, slices = (boxes + SLICE_BOXES - 1) / SLICE_BOXES;
  const int tiles = (s.rows + R - 1) / R / s.groups, unit = blockIdx.x / s.parts, group = unit % s.groups;
  const int step = gridDim.x / s.parts / s.groups;
  const int start = blockIdx.x % s.parts * NT, tokens = min(NT, s.tokens - start), apart = tokens * BOX_BYTES;
  const int chains = (boxes + W::CHAIN - 1) / W::CHAIN;
  u8* const ring = memory;
  u8* const input = ring + s.stages * STAGE;                                          // [boxes][X_BOXES][tokens][128]
  float* const sums = reinterpret_cast<float*>(input + boxes * W::X_BOXES * apart);  // [2][chains][R][NT]
  pdl_trigger();
  if (threadIdx.x == 0) {
    for (int i = 0; i < s.stages; i++) full[i].init(1), empty[i].init(1);
    fence_barriers();
  }
  __syncthreads();
  if (threadIdx.x >= WORKERS) {
    if (threadIdx.x == WORKERS) {
      const u64 policy = evict_first();
      int stage = 0, round = 0;
      for (int tile = unit / s.groups; tile < tiles; tile += step) {
        for (int box = 0; box < boxes; box += SLICE_BOXES) {
          const int count = min(SLICE_BOXES, boxes - box), row = (group * tiles + tile) * R;
          if (round) empty[stage].wait((round - 1) & 1);
          full[stage].arrive_expecting(count * BOX);
          for (int i = 0; i < count; i++)
            copy_box(ring + stage * STAGE + i * BOX, weight, (box + i) * BOX_BYTES, row, full[stage], policy);
          if (++stage == s.stages) stage = 0, round++;
        }
      }
    }
    pdl_wait();
    return;
  }
  pdl_wait();
  for (int i = threadIdx.x; i < boxes * W::X_BOXES * tokens * 8; i += WORKERS) {
    const int box = i / (tokens * 8), t = i / 8 % tokens, piece = i % 8, column = box * BOX_COLUMNS + piece * EIGHT;
    const bool there = column < s.columns;
    const bf16* const from = x + (start + t) * stride + static_cast<i64>(group) * s.columns + (there ? column : 0);
    copy16(input + box * apart + t * BOX_BYTES + 16 * (piece ^ (t & 7)), from, there);
  }
  copies_done();
  meet<WORKERS>(1);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int token = min(g, tokens - 1);  // places of tokens that are not there repeat the last: nobody reads their sums
  int count = 0, turn = 0;  // slices of all tiles, one after another
  for (int tile = unit / s.groups; tile < tiles; tile += step, turn ^= 1) {
    const int row = (group * tiles + tile) * R;
    float* const own = sums + turn * chains * R * NT;
    for (int slice = 0; slice < slices; slice++, count++) {
      // A stage is always the same warp's: it has seen what came before in it, so a barrier's parity tells it enough.
      const int stage = count % s.stages;
      if (stage % (WORKERS / 32) != warp) continue;
      const int first = slice * SLICE_BOXES, here = min(SLICE_BOXES, boxes - first);
      float by[CHAINS];
#pragma unroll
      for (int c = 0; c < CHAINS; c++)
        by[c] = W::scale(scale, static_cast<i64>(row / SCALE_ROWS) * boxes + min(first + c, boxes - 1));
      const u8* const tile_boxes = ring + stage * STAGE;
      float d[4] = {};
      full[stage].wait(count / s.stages & 1);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < SLICE_BOXES; i++) {
        if (i >= here) break;
        const u8* const w = tile_boxes + i * BOX;
        const u8* const v = input + (first + i) * W::X_BOXES * apart;
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint4 low = W::piece(w, g, t, h), high = W::piece(w, R > 8 ? g + 8 : g, t, h);
#pragma unroll
          for (int j = 0; j < W::X_BOXES; j++)
            mma(d, W::eight(low, j), R > 8 ? W::eight(high, j) : make_uint4(0, 0, 0, 0), W::tokens(v, apart, token, t, h, j));
        }
        if (i % W::CHAIN == W::CHAIN - 1 || i == here - 1) {
          const float times = by[i / W::CHAIN];
          float* const to = own + (first + i) / W::CHAIN * R * NT + g * NT + 2 * t;
          *reinterpret_cast<float2*>(to) = make_float2(d[0] * times, d[1] * times);
          if (R > 8) *reinterpret_cast<float2*>(to + 8 * NT) = make_float2(d[2] * times, d[3] * times);
          d[0] = d[1] = d[2] = d[3] = 0;
        }
      }
      __syncwarp();
      if (lane == 0) empty[stage].arrive();
    }
    meet<WORKERS>(1);  // one a tile: whoever is a tile ahead writes the other half
    for (int i = threadIdx.x; i < R * tokens; i += WORKERS) {
      const int r = i % R, at = i / R;
      float sum = 0;
#pragma unroll 4
      for (int chain = 0; chain < chains; chain++) sum += own[(chain * R + r) * NT + at];
      if (row + r < s.rows) y[static_cast<i64>(start + at) * s.rows + row + r] = narrow<T>(sum);
    }
  }
}

#define MATMUL_FEW(NAME, R, W, T)                                                                            \
  extern "C" __global__ void __launch_bounds__(288, 2) NAME(                                                 \
      const __grid_constant__ TensorMap weight, const u8* scale, const bf16* x, i64 stride, T* y, int rows,  \
      int columns, int tokens, int groups, int parts, int stages) {                                          \
    matmul_few<R, W, T>(weight, scale, x, stride, y, {rows, columns, tokens, groups, parts, stages});        \
  }

MATMUL_FEW(matmul_few_8, 8, Bf16Weights, float)
MATMUL_FEW(matmul_few_16, 16, Bf16Weights, float)
MATMUL_FEW(grouped_few_bf16, 16, Bf16Weights, bf16)
MATMUL_FEW(grouped_few_e4m3, 16, E4m3Weights, bf16)
