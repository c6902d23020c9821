// y = x W^T for many tokens: E4M3 weights with a UE8M0 scale for 128 x 128, E4M3 tokens with one for 128.
//
// Bits    those of linear_fp8.cu: 128 columns add up in the tensor core, are scaled and added in FP32, column by column
//         within a segment, then segment by segment. Tiles, clusters and the order of the tiles change none.
// Form    a block takes tiles of 128 rows of weights (N) and 128 or 256 tokens (M). Two groups of four warps have 64
//         tokens of a piece each: while one scales and adds, the tensor cores work for the other. A thread has sums of
//         two tokens, thus two scales for 64 sums, which it loads itself, 512 columns ahead. Four more warps bring
//         weights and tokens. Where tiles are few (`_split`), each block of a cluster has a segment of the columns, and
//         all add up what comes out.
// Ceiling a multiprocessor multiplies 64 x 128 x 128 in 256 cycles, a tile of 128 tokens in 512. In those
//         - the groups read 8 KB of tokens and 16 KB of weights each, and the copies write 32 KB: 640 cycles at 128
//           bytes, 80 % of the tensor cores' peak; with 256 tokens 89 %. (If all of that shares one port.)
//         - each group has 64 multiplications a thread: about 70 cycles of 256, behind the other's products.
//         - the second cache gives 32 KB: at 6 TB/s that allows 770 TFLOP/s; with 256 tokens 1,020.
// Measured 8,192 tokens on an H100 (bench/results/2026-11-28-linear-wide.jsonl), share of the 1,451 TFLOP/s that
//         cuBLASLt reached in the same run: wq_b 616 us (61.5 %), wo_b 598 (63.4 %), shared w1 and w3 317 (59.8 %); Pro
//         wq_b 1,785 (63.7 %), wo_b 2,317 (57.2 %), w1 and w3 830 (59.9 %). Other runs differ by 4 to 10 %: the GPU's
//         clock falls under load.
// Tried   ("warps4") weights on M and tokens on N, two warps that bring scales for 512 columns at a time: 6 to 13 %
//         longer in the same run. Groups that bring their own scales, 128 columns at a time ("today"): 7 to 21 %. Two
//         warps that bring these ("old"): 10 % shorter to 18 % longer, and racecheck found them in a race with who
//         read, for whom one lane in 32 gave leave. Groups that give their products in turn, by barriers ("tm_turns"):
//         3 to 9 % longer.
//         Clusters whose blocks share rows or tokens: pairs gain nothing, so it is not the second cache; fours take
//         twice the time, for 32 of them do not run at once.
//
// arch: sm_90a
#include "common/linear_wide.cuh"

using Share = Registers<FEEDERS, CONSUMERS, 40, 232>;
constexpr int BUFFER = 8192;  // bytes that a group stores at a time

// 64 rows of BF16 or 32 of FP32 of a group's tokens, as a box of 128 bytes a token, swizzled.
__device__ __forceinline__ void lay_out(u8* box, const float* sum, bf16*) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  u8* const to = box + (16 * warp + lane % 16) * ROW_BYTES;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    u32 word[4];
#pragma unroll
    for (int i = 0; i < 4; i++) word[i] = bf16x2(sum[8 * j + 2 * i], sum[8 * j + 2 * i + 1]);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(to + 16 * ((2 * j + lane / 16) ^ (lane & 7)))),
                 "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
  }
}
__device__ __forceinline__ void lay_out(u8* box, const float* sum, float*) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  u8* const to = box + (16 * warp + lane / 4) * ROW_BYTES + lane % 2 * 8;
#pragma unroll
  for (int i = 0; i < 16; i += 2)  // eight tokens on is the same place in the pattern
    *reinterpret_cast<float2*>(to + i / 2 % 2 * 8 * ROW_BYTES + 16 * ((i / 4 * 2 + lane % 4 / 2) ^ (lane / 4))) =
        make_float2(sum[i], sum[i + 1]);
}

// A group's tokens of a piece on their way to y, by way of its buffer.
template <class T>
__device__ __forceinline__ void store(const float (&sum)[D], const TensorMap& y, Place at, const Sizes& s, u8* buffer) {
  constexpr int ROWS = ROW_BYTES / sizeof(T), TOKENS = TILE / sizeof(T);  // of a box in shared memory, and of y's
  const int group = threadIdx.x / GROUP - 1;
  const bool leader = threadIdx.x % GROUP == 0;
  if (at.token >= s.tokens) return;  // the same for the whole group
#pragma unroll
  for (int row = 0; row < TILE; row += ROWS) {
    if (at.row + row >= s.rows) break;
    if (leader) stores_read<0>();
    meet_group(group);
    lay_out(buffer, sum + row * D / TILE, static_cast<T*>(nullptr));
    fence_shared();
    meet_group(group);
    if (leader) {
#pragma unroll
      for (int token = 0; token < GROUP_TOKENS; token += TOKENS)
        if (at.token + token < s.tokens)
          store_box(y, (at.row + row) * static_cast<int>(sizeof(T)), at.token + token, buffer + token * ROW_BYTES);
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
  u8* const buffers = memory + stages * Ring<PIECES>::BYTES;
  Ring<PIECES> ring{full, empty, memory, stages};
  pdl_trigger();
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; i++) full[i].init(FILLS), empty[i].init(CONSUMERS / 32);
    fence_barriers();
  }
  __syncthreads();
  if (threadIdx.x < FEEDERS) {
    Share::give();
    const Tiles<PIECES * TILE> tiles(s, width);
    const int first = blockIdx.x, step = gridDim.x;
    feed<PIECES>(ring, weight, x, s, {tiles, first, step, 0, s.blocks});
    return;
  }
  Share::take();
  const Tiles<PIECES * TILE> tiles(s, width);
  pdl_wait();
  const int group = threadIdx.x / GROUP - 1;
  u8* const own = buffers + group * BUFFER;
  Scales<PIECES> scales;
  scales.start(weight_scale, x_scale, s, tiles(blockIdx.x), 0, s.blocks);
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
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
          multiply(part, ring.tokens() + piece * PIECE + group * (PIECE / 2), ring.weights());
          if (piece == 0 && b % RUN == 0) scales.turn();
          const float2 by = scales.of(piece);
          wgmma_wait<0>();
          if (piece == PIECES - 1) ring.release();
          promote(sum[piece], part, by);
        }
        scales.step();
      }
      if constexpr (SEVERAL) {
#pragma unroll
        for (int i = 0; i < D; i++) all[i] = segment ? all[i] + sum[0][i] : segments > 1 ? 0.0f + sum[0][i] : sum[0][i];
      }
    }
    Place at = tiles(tile);
    if (tile + gridDim.x < tiles.count()) scales.start(weight_scale, x_scale, s, tiles(tile + gridDim.x), 0, s.blocks);
    at.token += group * GROUP_TOKENS;
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
