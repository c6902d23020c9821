// The body of mhc_step.cu's kernels.
#pragma once
#include "common/cluster.cuh"
#include "common/mhc_finish.cuh"
#include "common/mhc_mix.cuh"

namespace mhc {

constexpr int STEP_WARPS = 12, STEP_THREADS = 32 * STEP_WARPS, STEP_ROWS = 2;  // of fn, a warp
constexpr int STEP_BOUND = 512;  // more than there are: keeps registers under 128, and room for the kernel in front
constexpr int STEP_N = STEP_WARPS * STEP_ROWS;
constexpr int STEP_OWN = 2;  // ranges of a block at most
enum StepPhase { SUMS, SQUARES, TOPS, STEP_PHASES };
using StepCluster = Cluster<STEP_PHASES>;

struct StepScratch {
  float4 x[STEP_OWN][4 * QUADS];
  float partial[MOST_WARPS][STEP_N + 1];
  float sums[STEP_N + 1];
  alignas(16) float all[2][32];
  alignas(8) u64 barriers[STEP_PHASES];
};

struct StepTeam : StepCluster {
  __device__ void share(float* all, int chunk, float value, int phase) const {
    put(all + chunk, value, phase);
    await(phase);
  }
};

// A cluster takes one token; its block r has the ranges r, r + size, ... that there are: two at most.
template <class T, class Format>
__device__ __forceinline__ void step(const Streams<T>& in, const float* fn, const Site& site, float norm_eps, T* x,
                                     int d, const Next<T>& next, StepScratch& s) {
  const int ranges = ranges_of(d), rank = StepCluster::rank(), size = StepCluster::size();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const i64 token = blockIdx.x / size;
  const StepTeam team{{s.barriers, min(size, ranges)}};
  const bool last = warp == STEP_WARPS - 1 && rank == 0;  // the warp of the way back
  pdl_trigger();
  Weights<STEP_ROWS> held;
  held.load(fn, warp * STEP_ROWS, min(rank, ranges - 1), d);
  const int own = rank + warp * size, column = own * RANGE + lane * EIGHT;  // of the finish: one warp a range
  const bool finishes = warp < STEP_OWN && own < ranges, there = finishes && column < d;
  float weight[8];
  if (warp < STEP_OWN) load8_shared(weight, next.weight + (there ? column : 0), EIGHT, true);
  const float scale = site.scale[lane & 3], base = site.base[lane & 3];
  const WayBack<4> way_back(site, last);
  if (threadIdx.x < 32) s.all[0][threadIdx.x] = 0;
  const bool stages = threadIdx.x < FEW_THREADS;
  Share<T> share(in, token, d, min(rank, ranges - 1));
  if (stages) share.prefetch();
  team.begin({ranges * (STEP_N + 1) * 4, ranges * 4, ranges * 4});
  pdl_wait();
  if (rank >= ranges) return;
#pragma unroll
  for (int i = 0; i < STEP_OWN; i++) {
    const int range = rank + i * size;
    if (range >= ranges) break;
    if (i) held.load(fn, warp * STEP_ROWS, range, d), share = Share<T>(in, token, d, range);
    if (stages) share.stage(s.x[i], d, -1);
    __syncthreads();
    float sum[STEP_ROWS] = {}, squares = 0;
#pragma unroll
    for (int q = 0; q < 8; q++) {
      const float4 v = s.x[i][q % 4 * QUADS + q / 4 * 32 + lane];
#pragma unroll
      for (int r = 0; r < STEP_ROWS; r++) sum[r] = dot(v, held.at[r][q], sum[r]);
      if (warp == 0) squares = dot(v, v, squares);
    }
#pragma unroll
    for (int r = 0; r < STEP_ROWS; r++) team.put(&s.partial[range][warp * STEP_ROWS + r], warp_sum(sum[r]), SUMS);
    if (warp == 0) team.put(&s.partial[range][STEP_N], warp_sum(squares), SUMS);
  }
  team.await(SUMS);
  const RangeSums sums(s.partial[0], ranges, STEP_N, STEP_WARPS);
  sums.store(sums.load(0), s.sums);
  __syncthreads();
  const float factor = rms_factor(s.sums[STEP_N], 4 * d, norm_eps);
  if (!finishes) {
    float none[1];
    if (last) way_back.run(site, s.sums, factor, token, none);
    pass_norm_quant<T, Format>(next, team);
    return;
  }
  const float pre = sigmoid(logit(s.sums[lane & 3], factor, scale, base)) + site.eps;
  const float total = Format::GLOBAL && next.total ? *next.total : 1.0f;
  float4 low = {}, high = {};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const float by = __shfl_sync(ALL_LANES, pre, j);
    const float4* const v = &s.x[warp][j * QUADS + 2 * lane];
    low = scaled_sum(by, v[0], low), high = scaled_sum(by, v[1], high);
  }
  float u[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 8; i++) u[i] = rounded<T>(u[i]);
  if (there) store8(x + token * d + column, u, EIGHT, true);
  norm_quant<T, Format>(u, weight, total, next, token, own, d, s.all, team);
}

}  // namespace mhc
