// As linear_fp8_wide.cu, for products of few tiles: a cluster has a tile at a time, each of its blocks a segment of the
// columns. They lay their sums on sheets, and each adds up a share of the tokens, segment by segment.
//
// Moves   the weights once for 128 tokens.
// Floor   at 3.0 TB/s 11.2 us for 33.6 MB; the tensor cores take 4.7 us for 128 tokens of them, spread over 128 blocks.
// Measured on an H100 (bench/results/2026-11-28-linear-wide.jsonl), 128 tokens: wo_b 29.6 us (36.4 in tiles of all
//         columns, cuBLASLt 26.3), Pro's shared w1 and w3 32.4 (33.6 and 25.1). Before, with scales 128 columns at a
//         time and one stage less: wo_b 32 us (2026-11-27-linear-wide.jsonl). Clusters of four run in two rounds where
//         there are 32.
//
// arch: sm_90a
#include "common/linear_wide.cuh"
#include "common/peers.cuh"

using Share = Registers<FEEDERS, CONSUMERS, 56, 224>;
constexpr int MOST_SEGMENTS = 4;
constexpr int PITCH = TILE + 4;  // floats from token to token of a sheet, so that no two lanes meet in a bank

__device__ __forceinline__ void store4(float* to, float4 v) { *reinterpret_cast<float4*>(to) = v; }
__device__ __forceinline__ void store4(bf16* to, float4 v) {
  *reinterpret_cast<uint2*>(to) = make_uint2(bf16x2(v.x, v.y), bf16x2(v.z, v.w));
}

// One segment in each block of a cluster. Each lays its sums on a sheet, and adds up a share of the tokens of all sheets.
template <class T>
__device__ __forceinline__ void linear_split(const TensorMap& weight, const TensorMap& x, const u8* weight_scale,
                                             const u8* x_scale, T* y, const Sizes& s, int stages, int width) {
  DYNAMIC_SHARED(__align__(1024) u8, memory);
  __shared__ Barrier full[MOST_STAGES], empty[MOST_STAGES], laid, taken;
  const int rank = cluster_rank(), size = cluster_size();
  const Tiles<TILE> tiles(s, width);
  const int cluster = blockIdx.x / size, clusters = gridDim.x / size;
  const int first = rank * s.blocks / size, last = (rank + 1) * s.blocks / size;
  float* const sheet = reinterpret_cast<float*>(memory + stages * Ring<1>::BYTES);
  Ring<1> ring{full, empty, memory, stages};
  pdl_trigger();
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; i++) full[i].init(FILLS), empty[i].init(CONSUMERS / 32);
    laid.init(CONSUMERS / 32 * size), taken.init(CONSUMERS / 32 * size);
    fence_barriers();
  }
  __syncwarp();
  meet_cluster();
  if (threadIdx.x < FEEDERS) {
    Share::give();
    feed<1>(ring, weight, x, s, {tiles, cluster, clusters, first, last});
  } else {
    Share::take();
    pdl_wait();
    const int group = threadIdx.x / GROUP - 1, warp = threadIdx.x / 32 - FEEDERS / 32, lane = threadIdx.x % 32;
    Scales<1> scales;
    u32 parity = 0;
    for (int tile = cluster; tile < tiles.count(); tile += clusters) {
      const Place at = tiles(tile);
      scales.start(weight_scale, x_scale, s, at, first, last);
      float part[D], sum[D];
#pragma unroll
      for (int i = 0; i < D; i++) sum[i] = 0;
      for (int b = first; b < last; b++) {
        ring.await_full();
        multiply(part, ring.tokens() + group * (PIECE / 2), ring.weights());
        if ((b - first) % RUN == 0) scales.turn();
        const float2 by = scales.of(0);
        scales.step();
        wgmma_wait<0>();
        ring.release();
        promote(sum, part, by);
      }
      taken.wait_cluster(parity ^ 1);  // the sheet before it; true at once the first time
#pragma unroll
      for (int i = 0; i < D; i += 2)
        *reinterpret_cast<float2*>(sheet + (warp * 16 + i / 2 % 2 * 8 + lane / 4) * PITCH + i / 4 * 8 + lane % 4 * 2) =
            make_float2(sum[i], sum[i + 1]);
      __syncwarp();
      if (lane < size) laid.release_at(lane);
      laid.wait_cluster(parity);
      parity ^= 1;
      const int row = at.row + 4 * lane, share = TILE / size;
      for (int token = rank * share + warp; token < (rank + 1) * share; token += CONSUMERS / 32) {
        float4 v[MOST_SEGMENTS];
#pragma unroll
        for (int r = 0; r < MOST_SEGMENTS; r++)
          if (r < size) v[r] = load_from(sheet + token * PITCH + 4 * lane, r);
        float4 all = v[0];
        if (size > 1) all = make_float4(0.0f + all.x, 0.0f + all.y, 0.0f + all.z, 0.0f + all.w);
#pragma unroll
        for (int r = 1; r < MOST_SEGMENTS; r++)
          if (r < size) all.x += v[r].x, all.y += v[r].y, all.z += v[r].z, all.w += v[r].w;
        if (row < s.rows && at.token + token < s.tokens) store4(y + static_cast<i64>(at.token + token) * s.rows + row, all);
      }
      __syncwarp();
      if (lane < size) taken.release_at(lane);
    }
    __syncwarp();
  }
  meet_cluster();  // a sheet is read until here
}

#define LINEAR_FP8_SPLIT(T)                                                                                          \
  extern "C" __global__ void __launch_bounds__(FEEDERS + CONSUMERS, 1) linear_fp8_split_##T(                         \
      const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x, const u8* weight_scale,         \
      const u8* x_scale, T* y, int rows, int tokens, int blocks, int groups, int stages, int width) {                \
    linear_split<T>(weight, x, weight_scale, x_scale, y, {rows, tokens, blocks, 1, groups}, stages, width);          \
  }

LINEAR_FP8_SPLIT(bf16)
LINEAR_FP8_SPLIT(float)
