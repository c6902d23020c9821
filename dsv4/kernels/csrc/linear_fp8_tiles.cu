// y = x W^T for many tokens: E4M3 weights with a UE8M0 scale for 128 x 128, E4M3 tokens with one for 128.
//
// Bits    those of linear_fp8.cu: 128 columns add up in the tensor core, are scaled and added in FP32, column by column
//         within a segment, then segment by segment. Tiles, clusters and the order of the tiles change none.
// Form    a block takes tiles of 128 rows of weights (N) and 128 or 256 tokens (M). Two groups of four warps have 64 tokens
//         each, four more warps bring weights, tokens and the products of both scales. A thread has sums of two tokens, thus
//         two scales for 64 sums: with weights as M it has 32, whose loads take as long as the products.
//         `single`: a group's tensor cores wait while it scales and adds, and work for the other. `double`: it starts its
//         next product before. The sums of the segments before then lie in shared memory. Blocks of a pair share weights or
//         tokens.
//
// arch: sm_90a
#include "common/linear_tiles.cuh"

constexpr int BOX = GROUP_TOKENS * ROW_BYTES;  // bytes
constexpr int BUFFER = 2 * BOX;                // that a group stores at a time

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
  constexpr int ROWS = ROW_BYTES / sizeof(T);  // of a box
  const int group = threadIdx.x / GROUP - 1;
  const bool leader = threadIdx.x % GROUP == 0;
  if (at.token >= s.tokens || at.row >= s.rows) return;  // the same for the whole group
#pragma unroll
  for (int row = 0; row < TILE; row += 2 * ROWS) {
    if (leader) stores_read<0>();
    meet_group(group);
#pragma unroll
    for (int box = 0; box < 2; box++)
      lay_out(buffer + box * BOX, sum + (row + box * ROWS) * D / TILE, static_cast<T*>(nullptr));
    fence_shared();
    meet_group(group);
    if (leader) {
#pragma unroll
      for (int box = 0; box < 2; box++)
        store_box(y, (at.row + row + box * ROWS) * static_cast<int>(sizeof(T)), at.token, buffer + box * BOX);
      stores_commit();
    }
  }
}

// A group of warps, and the stage in front of it.
template <int PIECES>
struct Worker {
  Ring<PIECES>& ring;
  int group, size;

  __device__ __forceinline__ void start_next(float (&part)[D], float2& scale, int piece) {
    start(part, ring.tokens() + piece * PIECE + group * (PIECE / 2), ring.weights());
    scale = scales_of(ring.scales() + piece * TILE + group * GROUP_TOKENS);
  }
  __device__ __forceinline__ void release(int stage) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    if (lane < size) ring.empty[stage].arrive_in(lane);
  }
};

// One product under way a group.
template <int PIECES>
__device__ __forceinline__ void add_up(Worker<PIECES> worker, float (&sum)[PIECES][D], int count) {
  float part[D];
  float2 scale;
  Ring<PIECES>& ring = worker.ring;
  for (int b = 0; b < count; b++) {
    ring.await_full();
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
      worker.start_next(part, scale, piece);
      wgmma_wait<0>();
      if (piece == PIECES - 1) worker.release(ring.stage);
      promote(sum[piece], part, scale);
    }
    ring.next();
  }
}

// Two of them: the next is started before one is scaled and added.
__device__ __forceinline__ void add_up_double(Worker<1> worker, float (&sum)[D], int count) {
  float part[2][D];
  float2 scale[2];
  Ring<1>& ring = worker.ring;
  int held;
  ring.await_full();
  worker.start_next(part[0], scale[0], 0);
  held = ring.stage;
  ring.next();
#define NEXT(NEW, OLD)                          \
  ring.await_full();                            \
  worker.start_next(part[NEW], scale[NEW], 0);  \
  wgmma_wait<1>();                              \
  worker.release(held);                         \
  held = ring.stage;                            \
  ring.next();                                  \
  promote(sum, part[OLD], scale[OLD]);
#define LAST(OLD)       \
  wgmma_wait<0>();      \
  worker.release(held); \
  promote(sum, part[OLD], scale[OLD]);
  int left = count - 1;
  for (; left >= 2; left -= 2) {
    NEXT(1, 0)
    NEXT(0, 1)
  }
  if (left) {
    NEXT(1, 0)
    LAST(1)
  } else {
    LAST(0)
  }
#undef NEXT
#undef LAST
}

template <int PIECES, bool DOUBLE, class T>
__device__ __forceinline__ void linear(const TensorMap& weight, const TensorMap& x, const TensorMap& y,
                                       const u8* weight_scale, const u8* x_scale, const Sizes& s, const Plan& plan) {
  DYNAMIC_SHARED(__align__(1024) u8, memory);
  __shared__ Barrier full[MOST_STAGES], empty[MOST_STAGES];
  int rank, size;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  const Tiles<PIECES * TILE> tiles(s, size / plan.across, plan.across, plan.group);
  const int cluster = blockIdx.x / size, clusters = gridDim.x / size;
  u8* const buffers = memory + plan.stages * Ring<PIECES>::BYTES;
  float* const scales = reinterpret_cast<float*>(buffers + 2 * BUFFER);
  Ring<PIECES> ring{full, empty, memory, scales, plan.stages};
  pdl_trigger();
  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.stages; i++) full[i].init(3), empty[i].init(CONSUMERS / 32 * size);
    fence_barriers();
  }
  __syncwarp();
  meet_cluster();
  if (threadIdx.x < FEEDERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 48;");
    feed<PIECES>(ring, weight, x, weight_scale, x_scale, s, {tiles, cluster, clusters, rank, 0, s.blocks});
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    pdl_wait();
    const int group = threadIdx.x / GROUP - 1;
    float* const before = scales + plan.stages * PIECES * TILE + threadIdx.x - FEEDERS;  // sums of segments
    const Worker<PIECES> worker{ring, group, size};
    for (int tile = cluster; tile < tiles.count(); tile += clusters) {
      float sum[PIECES][D], all[PIECES == 1 && !DOUBLE ? D : 1];
      const int segments = PIECES == 1 ? s.segments : 1;
      for (int segment = 0; segment < segments; segment++) {
        const int count = (segment + 1) * s.blocks / segments - segment * s.blocks / segments;
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
          for (int i = 0; i < D; i++) sum[piece][i] = 0;
        if constexpr (DOUBLE) {
          add_up_double(worker, sum[0], count);
        } else {
          add_up<PIECES>(worker, sum, count);
        }
        if (segments > 1) {
#pragma unroll
          for (int i = 0; i < D; i++) {
            float& earlier = DOUBLE ? before[i * CONSUMERS] : all[PIECES == 1 && !DOUBLE ? i : 0];
            sum[0][i] = (segment ? earlier : 0.0f) + sum[0][i];
            if (segment < segments - 1) earlier = sum[0][i];
          }
        }
      }
      Place at = tiles(tile, rank);
      at.token += group * GROUP_TOKENS;
#pragma unroll
      for (int piece = 0; piece < PIECES; piece++, at.token += TILE) store<T>(sum[piece], y, at, s, buffers + group * BUFFER);
    }
    if (threadIdx.x % GROUP == 0) stores_written();
    __syncwarp();
  }
  meet_cluster();  // nothing comes to a block that has left
}

#define LINEAR_FP8_TILES(T, NAME, PIECES, DOUBLE)                                                                      \
  extern "C" __global__ void __launch_bounds__(FEEDERS + CONSUMERS, 1) linear_fp8_##NAME##_##T(                        \
      const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y, \
      const u8* weight_scale, const u8* x_scale, int rows, int tokens, int blocks, int segments, int stages,           \
      int across, int group) {                                                                                         \
    linear<PIECES, DOUBLE, T>(weight, x, y, weight_scale, x_scale, {rows, tokens, blocks, segments},                   \
                              {stages, across, group});                                                                \
  }

LINEAR_FP8_TILES(bf16, single, 1, false)
LINEAR_FP8_TILES(bf16, single256, 2, false)
LINEAR_FP8_TILES(bf16, double, 1, true)
LINEAR_FP8_TILES(float, single, 1, false)
LINEAR_FP8_TILES(float, single256, 2, false)
LINEAR_FP8_TILES(float, double, 1, true)
