// y = x W^T for many tokens: E4M3 weights with a UE8M0 scale for 128 x 128, E4M3 tokens with one for 128.
//
// Bits    those of linear_fp8.cu: 128 columns add up in the tensor core, are scaled and added in FP32, column by column
//         within a segment, then segment by segment. Tiles, clusters and the order of the tiles change none.
// Form    a block takes tiles of 128 rows of weights (M) and 128 or 256 tokens (N). Two groups of four warps have 64 rows
//         each: while one scales and adds, the tensor cores work for the other. Four more warps bring weights and tokens; the
//         scales are the groups' own business. Where tiles are few (`_split`), each block of a cluster has a segment of the
//         columns, and all of them add up what comes out.
// Ceiling a multiprocessor multiplies 64 x 128 x 128 in 256 cycles, a tile of 128 tokens in 512. In those
//         - the groups read 8 KB of weights, 16 KB of tokens and 8 KB worth of scales each, and the copies write 32 KB: 704
//           cycles at 128 bytes, 73 % of the tensor cores' peak; with 256 tokens 80 %. (If all of that shares one port.)
//         - each group has 64 multiplications and 8 loads a thread: about 80 cycles of 256, behind the other's products.
//         - the second cache gives 32 KB: at 6 TB/s that allows 770 TFLOP/s; with 256 tokens 1,020.
// Measured on an H100 (bench/results/2026-11-27-ops-second.jsonl): 8,192 tokens at 707 to 887 TFLOP/s, cuBLASLt at 945 to 1,224.
//         Where two more warps brought the scales it took 9 to 15 % less (2026-11-27-linear-wide.jsonl), but racecheck found
//         them in a race with who read, whom one lane in 32 gave leave.
// Tried   clusters whose blocks share rows or tokens: pairs gain nothing, so it is not the second cache; fours take twice
//         the time, for 32 of them do not run at once.
//
// arch: sm_90a
#include "common/linear_wide.cuh"

template <int PIECES>
using Share = Registers<FEEDERS, CONSUMERS, PIECES == 1 ? 56 : 40, PIECES == 1 ? 224 : 232>;
constexpr int BUFFER = 8192;  // bytes that a group stores at a time

// A group's 64 rows of 32 (FP32) or 64 tokens, those of `sum` from `i` on, as boxes of 128 bytes a token, swizzled.
__device__ __forceinline__ void lay_out(u8* buffer, const float* sum, bf16*) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, token = lane / 16 * 8 + lane % 8;
  u8* const to = buffer + token * ROW_BYTES + 16 * ((2 * warp + lane / 8 % 2) ^ (token & 7));
#pragma unroll
  for (int j = 0; j < 4; j++) {
    u32 word[4];
#pragma unroll
    for (int i = 0; i < 4; i++) word[i] = bf16x2(sum[8 * j + 2 * i], sum[8 * j + 2 * i + 1]);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(to + 16 * j * ROW_BYTES)),
                 "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
  }
}
__device__ __forceinline__ void lay_out(u8* buffer, const float* sum, float*) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  u8* const box = buffer + warp / 2 * (BUFFER / 2);
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, row = warp % 2 * 16 + i / 2 % 2 * 8 + lane / 4;
    *reinterpret_cast<float*>(box + token * ROW_BYTES + 16 * (row / 4 ^ (token & 7)) + row % 4 * 4) = sum[i];
  }
}

// A group's rows of a piece of tokens on their way to y, by way of its buffers.
template <class T>
__device__ __forceinline__ void store(const float (&sum)[D], const TensorMap& y, Place at, const Sizes& s, u8* buffer) {
  constexpr int ROUND = TILE / sizeof(T), BOX = ROW_BYTES / sizeof(T);  // tokens of a buffer, rows of a box
  const int group = threadIdx.x / GROUP - 1;
  const bool leader = threadIdx.x % GROUP == 0;
#pragma unroll
  for (int round = 0; round < TILE / ROUND; round++) {
    const int token = at.token + round * ROUND;
    if (token >= s.tokens || at.row >= s.rows) break;  // the same for the whole group
    if (leader) stores_read<0>();
    meet_group(group);
    lay_out(buffer, sum + round * (ROUND / 2), static_cast<T*>(nullptr));
    fence_shared();
    meet_group(group);
    if (leader) {
#pragma unroll
      for (int box = 0; box < GROUP_ROWS / BOX; box++)
        store_box(y, (at.row + box * BOX) * static_cast<int>(sizeof(T)), token, buffer + box * (BUFFER / 2));
      stores_commit();
    }
  }
}

// All segments of a tile in one block. width: tiles of tokens that are taken together.
template <int PIECES, bool SEVERAL, class T>
__device__ __forceinline__ void linear(const TensorMap& weight, const TensorMap& x, const TensorMap& y,
                                       const u8* weight_scale, const u8* x_scale, const Sizes& s, int stages, int width) {
  static_assert(PIECES == 1 || !SEVERAL, "three arrays of sums do not fit");
  DYNAMIC_SHARED(__align__(1024) u8, memory);
  __shared__ Barrier full[MOST_STAGES], empty[MOST_STAGES];
  const Tiles<PIECES * TILE> tiles(s, width);
  u8* const buffers = memory + stages * Ring<PIECES>::BYTES;
  Ring<PIECES> ring{full, empty, memory, stages};
  pdl_trigger();
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; i++) full[i].init(FILLS), empty[i].init(CONSUMERS / 32);
    fence_barriers();
  }
  __syncthreads();
  if (threadIdx.x < FEEDERS) {
    Share<PIECES>::give();
    feed<PIECES>(ring, weight, x, s, {tiles, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), 0, s.blocks});
    return;
  }
  Share<PIECES>::take();
  pdl_wait();
  const int group = threadIdx.x / GROUP - 1, lane = threadIdx.x % 32;
  u8* const own = buffers + group * BUFFER;
  Scales<PIECES> scales(reinterpret_cast<float*>(buffers + 2 * BUFFER), group);
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    scales.start(weight_scale, x_scale, s, tiles(tile), 0);
    float part[D], sum[PIECES][D], all[SEVERAL ? D : 1];
    const int segments = SEVERAL ? s.segments : 1;
    for (int segment = 0; segment < segments; segment++) {
      const int first = segment * s.blocks / segments, last = (segment + 1) * s.blocks / segments;
#pragma unroll
      for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
        for (int i = 0; i < D; i++) sum[piece][i] = 0;
      for (int b = first; b < last; b++) {
        ring.await_full();
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
          multiply(part, ring.weights() + group * (PIECE / 2), ring.tokens() + piece * PIECE);
          if (piece == 0) scales.hand_over(b, b + 1 < s.blocks, group);
          wgmma_wait<0>();
          promote(sum[piece], part, scales.of(b, piece));
        }
        __syncwarp();
        if (lane == 0) ring.empty[ring.stage].arrive();
        ring.next();
      }
      if constexpr (SEVERAL) {
#pragma unroll
        for (int i = 0; i < D; i++) all[i] = segment ? all[i] + sum[0][i] : segments > 1 ? 0.0f + sum[0][i] : sum[0][i];
      }
    }
    Place at = tiles(tile);
    at.row += group * GROUP_ROWS;
    if constexpr (SEVERAL) {
      store<T>(all, y, at, s, own);
    } else {
#pragma unroll
      for (int piece = 0; piece < PIECES; piece++, at.token += TILE) store<T>(sum[piece], y, at, s, own);
    }
  }
  if (threadIdx.x % GROUP == 0) stores_written();
}

#define LINEAR_FP8_WIDE(T, NAME, PIECES, SEVERAL)                                                                         \
  extern "C" __global__ void __launch_bounds__(FEEDERS + CONSUMERS, 1) linear_fp8_##NAME##_##T(                           \
      const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y, \
      const u8* weight_scale, const u8* x_scale, int rows, int tokens, int blocks, int segments, int groups, int stages,  \
      int width) {                                                                                                        \
    linear<PIECES, SEVERAL, T>(weight, x, y, weight_scale, x_scale, {rows, tokens, blocks, segments, groups}, stages,     \
                               width);                                                                                    \
  }

LINEAR_FP8_WIDE(bf16, wide128, 1, true)
LINEAR_FP8_WIDE(bf16, wide256, 2, false)
LINEAR_FP8_WIDE(float, wide128, 1, true)
LINEAR_FP8_WIDE(float, wide256, 2, false)
