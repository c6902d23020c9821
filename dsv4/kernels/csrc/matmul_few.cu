// y = x W^T in FP32 for up to eight tokens a block: BF16 weights as they are stored, read once.
//
// Moves   the weights once for eight tokens; all else is small.
// Floor   at 3.0 TB/s: 353 us for the head of Flash (1,059 MB), 7.2 us for what shares the input of a ratio-4 layer
//         (2,624 x 4096), 0.7 us for its router.
// Form    a block has R rows of weights at a time and all columns of its tokens in shared memory. One thread keeps a ring
//         of slices (R rows x 256 columns) filled, in front of the wait for x too; eight warps take slice after slice; the
//         slices' sums are added when all of a tile are there. Order of sums: common/mma.cuh.
// Why no clusters: blocks of small matrices finish at different times, but what one leaves of the bandwidth the others
//         get, as all of their bytes are asked for at once.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/mma.cuh"

constexpr int NT = 8, WORKERS = 256, MOST_STAGES = 24;

// R: 8 or 16 rows of a tile.
template <int R>
__device__ __forceinline__ void matmul_few(const TensorMap& weight, const bf16* x, i64 stride, float* y, int rows,
                                           int columns, int all_tokens, int parts, int stages) {
  DYNAMIC_SHARED(__align__(1024) u8, memory);
  __shared__ Barrier full[MOST_STAGES], empty[MOST_STAGES];
  constexpr int BOX = R * BOX_BYTES, STAGE = SLICE_BOXES * BOX;
  const int boxes = (columns + BOX_COLUMNS - 1) / BOX_COLUMNS, slices = (boxes + SLICE_BOXES - 1) / SLICE_BOXES;
  const int tiles = (rows + R - 1) / R, first = blockIdx.x / parts, step = gridDim.x / parts;
  const int start = blockIdx.x % parts * NT, tokens = min(NT, all_tokens - start);
  u8* const ring = memory;
  u8* const input = ring + stages * STAGE;                                        // [boxes][tokens][128]
  float* const sums = reinterpret_cast<float*>(input + boxes * tokens * BOX_BYTES);  // [2][slices][R][NT]
  pdl_trigger();
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; i++) full[i].init(1), empty[i].init(1);
    fence_barriers();
  }
  __syncthreads();
  if (threadIdx.x >= WORKERS) {
    if (threadIdx.x == WORKERS) {
      const u64 policy = evict_first();
      int stage = 0, round = 0;
      for (int tile = first; tile < tiles; tile += step) {
        for (int box = 0; box < boxes; box += SLICE_BOXES) {
          const int count = min(SLICE_BOXES, boxes - box);
          if (round) empty[stage].wait((round - 1) & 1);
          full[stage].arrive_expecting(count * BOX);
          for (int i = 0; i < count; i++)
            copy_box(ring + stage * STAGE + i * BOX, weight, (box + i) * BOX_BYTES, tile * R, full[stage], policy);
          if (++stage == stages) stage = 0, round++;
        }
      }
    }
    pdl_wait();
    return;
  }
  pdl_wait();
  for (int i = threadIdx.x; i < boxes * tokens * 8; i += WORKERS) {
    const int box = i / (tokens * 8), t = i / 8 % tokens, piece = i % 8, column = box * BOX_COLUMNS + piece * EIGHT;
    const bool there = column < columns;
    const bf16* const from = x + (start + t) * stride + (there ? column : 0);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     shared_address(input + (box * tokens + t) * BOX_BYTES + 16 * (piece ^ (t & 7)))),
                 "l"(from), "r"(there ? 16 : 0)
                 : "memory");
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  asm volatile("bar.sync 1, 256;" ::: "memory");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int token = min(g, tokens - 1);  // places of tokens that are not there repeat the last: nobody reads their sums
  int unit = 0, turn = 0;  // slices of all tiles, one after another
  for (int tile = first; tile < tiles; tile += step, turn ^= 1) {
    float* const own = sums + turn * slices * R * NT;
    for (int slice = 0; slice < slices; slice++, unit++) {
      // A stage is always the same warp's: it has seen what came before in it, so a barrier's parity tells it enough.
      const int stage = unit % stages;
      if (stage % (WORKERS / 32) != warp) continue;
      const int count = min(SLICE_BOXES, boxes - slice * SLICE_BOXES);
      const u8* const tile_boxes = ring + stage * STAGE;
      float d[4] = {};
      full[stage].wait(unit / stages & 1);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < SLICE_BOXES; i++) {
        if (i >= count) break;
        const u8* const w = tile_boxes + i * BOX;
        const u8* const v = input + (slice * SLICE_BOXES + i) * tokens * BOX_BYTES;
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint4 high = R > 8 ? box_piece(w, R > 8 ? g + 8 : g, 2 * t + h) : make_uint4(0, 0, 0, 0);
          mma(d, box_piece(w, g, 2 * t + h), high, box_piece(v, token, 2 * t + h));
        }
      }
      __syncwarp();
      if (lane == 0) empty[stage].arrive();
      float* const to = own + slice * R * NT + g * NT + 2 * t;
      *reinterpret_cast<float2*>(to) = make_float2(d[0], d[1]);
      if (R > 8) *reinterpret_cast<float2*>(to + 8 * NT) = make_float2(d[2], d[3]);
    }
    asm volatile("bar.sync 1, 256;" ::: "memory");  // one a tile: whoever is a tile ahead writes the other half
    for (int i = threadIdx.x; i < R * tokens; i += WORKERS) {
      const int r = i % R, at = i / R;
      float sum = 0;
#pragma unroll 4
      for (int slice = 0; slice < slices; slice++) sum += own[(slice * R + r) * NT + at];
      if (tile * R + r < rows) y[static_cast<i64>(start + at) * rows + tile * R + r] = sum;
    }
  }
}

#define MATMUL_FEW(R)                                                                                       \
  extern "C" __global__ void __launch_bounds__(288) matmul_few_##R(                                         \
      const __grid_constant__ TensorMap weight, const bf16* x, i64 stride, float* y, int rows, int columns, \
      int tokens, int parts, int stages) {                                                                  \
    matmul_few<R>(weight, x, stride, y, rows, columns, tokens, parts, stages);                              \
  }

MATMUL_FEW(8)
MATMUL_FEW(16)
