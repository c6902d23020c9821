// As linear_fp8_tiles.cu, for products of few tiles: a tile has 64 rows of weights (N) and 128 tokens (M), and each of the
// two groups of a block a segment of the columns. The blocks of a cluster have a tile's two segments, or four: they lay the
// sums on sheets, and each adds up a share of the tokens, segment by segment.
//
// Moves   the weights once for 128 tokens.
// Floor   at 3.0 TB/s 11.2 us for 33.6 MB; the tensor cores take 4.7 us for 128 tokens of them, spread over 128 blocks.
// Form    of pairs 66 run at once, of clusters of four fewer than 31: one block a segment took two rounds for 32 tiles.
//
// arch: sm_90a
#include "common/linear_tiles.cuh"

constexpr int ROWS = 64;                 // of a tile
constexpr int HALF = ROWS * ROW_BYTES;   // bytes of weights of a group and stage
constexpr int PITCH = ROWS + 8;          // floats from token to token of a sheet: no two lanes that store meet in a bank
constexpr int SHEET = TILE * PITCH;      // floats
constexpr int MOST_SEGMENTS = 4, E = 32;  // E: sums of 64 tokens and 64 rows in a thread

// Four floats of another block's shared memory.
__device__ __forceinline__ float4 load_from(const float* p, int rank) {
  float4 v;
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n"
      "}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared_address(p)), "r"(rank)
      : "memory");
  return v;
}

__device__ __forceinline__ void store4(float* to, float4 v) { *reinterpret_cast<float4*>(to) = v; }
__device__ __forceinline__ void store4(bf16* to, float4 v) {
  *reinterpret_cast<uint2*>(to) = make_uint2(bf16x2(v.x, v.y), bf16x2(v.z, v.w));
}

// The columns of a segment, in blocks of 128.
struct Columns {
  int first, count;

  __device__ Columns(const Sizes& s, int segment)
      : first(segment * s.blocks / s.segments), count((segment + 1) * s.blocks / s.segments - first) {}
};

// Stages of both groups: each brings 128 columns of either segment, as long as there are any. Each warp does one thing.
__device__ __forceinline__ void feed_halves(Ring<2> ring, const TensorMap& weight, const TensorMap& x, const u8* weight_scale,
                                            const u8* x_scale, const Sizes& s, int cluster, int clusters, int rank,
                                            int wide, int turns) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tiles = (s.rows + ROWS - 1) / ROWS * wide;
  const Columns columns[2] = {{s, 2 * rank}, {s, 2 * rank + 1}};
  if (warp != 0) pdl_wait();
  if (warp < 2 && lane != 0) return;
  for (int tile = cluster; tile < tiles; tile += clusters) {
    const int row = tile / wide * ROWS, token = tile % wide * TILE;
    for (int turn = 0; turn < turns; turn++, ring.next()) {
      Barrier& full = ring.full[ring.stage];
      if (warp < 2) {
        ring.await_empty();
        full.arrive_expecting(warp == 0 ? 2 * HALF : 2 * PIECE);
      } else if ((turn & 1) != (warp & 1)) {
        continue;
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        // Behind the end of a shorter segment its last columns again, which nobody reads.
        const int b = columns[half].first + min(turn, columns[half].count - 1);
        if (warp == 0) copy_box(ring.weights() + half * HALF, weight, b * TILE, row, full);
        if (warp == 1) copy_box(ring.tokens() + half * PIECE, x, b * TILE, token, full);
        if (warp >= 2) {
          const float by = ue8m0_float(weight_scale[static_cast<i64>(row / TILE) * s.blocks + b]);
          float found[4];
#pragma unroll
          for (int q = 0; q < 4; q++) {
            const int t = token + 32 * q + lane;
            found[q] = t < s.tokens ? ue8m0_float(x_scale[static_cast<i64>(t) * s.blocks + b]) * by : 0.0f;
          }
          if (half == 0) ring.await_empty();
#pragma unroll
          for (int q = 0; q < 4; q++) ring.scales()[half * TILE + 32 * q + lane] = found[q];
        }
      }
      if (warp >= 2) {
        __syncwarp();
        if (lane == 0) full.arrive();
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void linear_halves(const TensorMap& weight, const TensorMap& x, const u8* weight_scale,
                                              const u8* x_scale, T* y, const Sizes& s, int stages) {
  DYNAMIC_SHARED(__align__(1024) u8, memory);
  __shared__ Barrier full[MOST_STAGES], empty[MOST_STAGES], laid, taken;
  int rank, size;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  const int cluster = blockIdx.x / size, clusters = gridDim.x / size;
  const int wide = (s.tokens + TILE - 1) / TILE, tiles = (s.rows + ROWS - 1) / ROWS * wide;
  const int turns = (s.blocks + s.segments - 1) / s.segments;  // of the longest segment
  float* const sheets = reinterpret_cast<float*>(memory + stages * Ring<2>::BYTES);
  Ring<2> ring{full, empty, memory, sheets + 2 * SHEET, stages};
  pdl_trigger();
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; i++) full[i].init(3), empty[i].init(CONSUMERS / 32);
    laid.init(CONSUMERS / 32 * size), taken.init(CONSUMERS / 32 * size);
    fence_barriers();
  }
  __syncwarp();
  meet_cluster();
  if (threadIdx.x < FEEDERS) {
    feed_halves(ring, weight, x, weight_scale, x_scale, s, cluster, clusters, rank, wide, turns);
    __syncwarp();
  } else {
    pdl_wait();
    const int group = threadIdx.x / GROUP - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const Columns columns(s, 2 * rank + group);
    float* const sheet = sheets + group * SHEET;
    u32 parity = 0;
    for (int tile = cluster; tile < tiles; tile += clusters) {
      const int row = tile / wide * ROWS + lane % 16 * 4, token = tile % wide * TILE, left = s.tokens - token;
      float part[E], sum[2][E];
#pragma unroll
      for (int i = 0; i < E; i++) sum[0][i] = sum[1][i] = 0;
      for (int turn = 0; turn < turns; turn++) {
        ring.await_full();
#pragma unroll
        for (int piece = 0; piece < 2; piece++) {
          if (turn >= columns.count || piece * GROUP_TOKENS >= left) continue;  // the same for the whole group
          const u64 a = operand(ring.tokens() + group * PIECE + piece * (PIECE / 2));
          const u64 b = operand(ring.weights() + group * HALF);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; k++) wgmma(part, a + 2 * k, b + 2 * k, k);
          wgmma_commit();
          const float2 scale = scales_of(ring.scales() + group * TILE + piece * GROUP_TOKENS);
          wgmma_wait<0>();
#pragma unroll
          for (int i = 0; i < E; i++) sum[piece][i] = fmaf(part[i], i & 2 ? scale.y : scale.x, sum[piece][i]);
        }
        __syncwarp();
        if (lane == 0) ring.empty[ring.stage].arrive();
        ring.next();
      }
      taken.wait_cluster(parity ^ 1);  // the sheet before it; true at once the first time
#pragma unroll
      for (int piece = 0; piece < 2; piece++)
#pragma unroll
        for (int i = 0; i < E; i += 2) {
          const int t = piece * GROUP_TOKENS + warp * 16 + i / 2 % 2 * 8 + lane / 4;
          *reinterpret_cast<float2*>(sheet + t * PITCH + i / 4 * 8 + lane % 4 * 2) =
              make_float2(sum[piece][i], sum[piece][i + 1]);
        }
      __syncwarp();
      if (lane < size) laid.release_at(lane);
      laid.wait_cluster(parity);
      parity ^= 1;
      // Half a warp has a token.
      for (int t = ((threadIdx.x - FEEDERS) / 16) * size + rank; t < min(left, TILE); t += CONSUMERS / 16 * size) {
        float4 v[MOST_SEGMENTS];
#pragma unroll
        for (int segment = 0; segment < MOST_SEGMENTS; segment++)
          if (segment < 2 * size)
            v[segment] = load_from(sheets + segment % 2 * SHEET + t * PITCH + lane % 16 * 4, segment / 2);
        float4 all = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int segment = 0; segment < MOST_SEGMENTS; segment++)
          if (segment < 2 * size)
            all.x += v[segment].x, all.y += v[segment].y, all.z += v[segment].z, all.w += v[segment].w;
        store4(y + static_cast<i64>(token + t) * s.rows + row, all);
      }
      __syncwarp();
      if (lane < size) taken.release_at(lane);
    }
  }
  __syncwarp();
  meet_cluster();  // a sheet is read until here
}

#define LINEAR_FP8_HALVES(T)                                                                                           \
  extern "C" __global__ void __launch_bounds__(FEEDERS + CONSUMERS, 1) linear_fp8_halves_##T(                          \
      const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x, const u8* weight_scale,           \
      const u8* x_scale, T* y, int rows, int tokens, int blocks, int segments, int stages) {                           \
    linear_halves<T>(weight, x, weight_scale, x_scale, y, {rows, tokens, blocks, segments}, stages);                   \
  }

LINEAR_FP8_HALVES(bf16)
LINEAR_FP8_HALVES(float)
