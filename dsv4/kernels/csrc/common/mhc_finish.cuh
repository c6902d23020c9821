// The bodies of mhc_finish.cu's kernels: one block a token, one warp a chunk of 256 columns, and one warp more for
// the way back (post and comb), whose Sinkhorn iteration takes longer than all that the others do.
#pragma once
#include "common/formats.cuh"
#include "common/mhc.cuh"

namespace mhc {

constexpr int MOST_WARPS = 31;  // beside the one more: d up to 7,936
constexpr int FINISH_THREADS = 32 * (MOST_WARPS + 1);

// Weights of a site and what they make: everything but the streams. Shapes as in dsv4/ops/mhc.py, n = M (M + 2), or M
// before the head, which has no post and no comb.
struct Site {
  const float* base;
  const float* scale;
  float* post;
  float* comb;
  int m, iterations;
  float eps;
};

// How the warps of the chunks tell each other one number each: through shared memory, and a barrier of theirs alone.
// The shim knows no barrier of some warps: there the one more joins them, once a `share`.
struct Block {
  int chunks;

  __device__ void share(float* all, int chunk, float value, int) const {
    if (threadIdx.x % 32 == 0) all[chunk] = value;
#ifdef __CUDA_ARCH__
    asm volatile("bar.sync 1, %0;" ::"r"(32 * chunks) : "memory");
#else
    __syncthreads();
#endif
  }

  __device__ void pass() const {
#ifndef __CUDA_ARCH__
    __syncthreads();
#endif
  }
};

// One logit: the sum over its row of fn, over the root mean square of the streams, scaled and shifted.
__device__ __forceinline__ float logit(float sum, float factor, float scale, float base) {
  return sum * factor * scale + base;
}

// What a lane of the one more warp needs for the way back, read before the wait.
template <int M>
struct WayBack {
  float scale[2] = {}, base[2] = {};

  __device__ WayBack(const Site& site, bool mine) {
    const int lane = threadIdx.x % 32, at[2] = {M + (lane & (M - 1)), 2 * M + (lane & (M * M - 1))};
    if (!mine) return;
#pragma unroll
    for (int i = 0; i < 2; i++) scale[i] = site.scale[at[i]], base[i] = site.base[at[i]];
  }

  __device__ void run(const Site& site, const float* sums, float factor, i64 token, float (&)[1]) const {
    static_assert(M == 4);
    const int lane = threadIdx.x % 32;
    const float post = 2 * sigmoid(logit(sums[M + (lane & 3)], factor, scale[0], base[0]));
    if (lane < M) site.post[token * M + lane] = post;
    const float l = logit(sums[2 * M + (lane & 15)], factor, scale[1], base[1]);
    const float comb = sinkhorn_4(l, site.iterations, site.eps);
    if (lane < M * M) site.comb[token * (M * M) + lane] = comb;
  }
};

template <>
struct WayBack<0> {
  __device__ WayBack(const Site&, bool) {}

  __device__ void run(const Site& site, const float* sums, float factor, i64 token,
                      float (&a)[MOST * SINKHORN_STRIDE]) const {
    const int lane = threadIdx.x % 32, m = site.m;
    if (lane < m) {
      const float l = logit(sums[m + lane], factor, site.scale[m + lane], site.base[m + lane]);
      site.post[token * m + lane] = 2 * sigmoid(l);
    }
    for (int e = lane; e < m * m; e += 32)
      a[e / m * SINKHORN_STRIDE + e % m] = logit(sums[2 * m + e], factor, site.scale[2 * m + e], site.base[2 * m + e]);
    __syncwarp();
    sinkhorn_any(a, m, site.iterations, site.eps);
    for (int e = lane; e < m * m; e += 32) site.comb[token * m * m + e] = a[e / m * SINKHORN_STRIDE + e % m];
  }
};

// The next sublayer's norm and quantiser. `total`: NVFP4's global scale, null for 1; `own`: where a row's own one goes.
template <class T>
struct Next {
  const float* weight;
  float eps;
  T* y;
  u8* data;
  u8* scale;
  const float* total;
  float* own;
};

struct Nothing {  // in place of a format: no norm and no quantiser
  static constexpr bool GLOBAL = false;
};
template <class Format>
constexpr bool QUANTISED = true;
template <>
constexpr bool QUANTISED<Nothing> = false;

template <int M>
struct Scratch {
  float sums[M ? M * (M + 2) + 1 : MOST_ROWS + 1];
  alignas(16) float all[2][32];
  float a[M ? 1 : MOST * SINKHORN_STRIDE];
};

// From x, rounded to T, to the next sublayer's input: norm, quantiser, stores. By a warp for each chunk of the row;
// `all`: two arrays with a number a chunk, that `team` shares.
template <class T, class Format, class Team>
__device__ __forceinline__ void norm_quant(const float (&x)[8], const float (&weight)[8], float total,
                                           const Next<T>& next, i64 token, int chunk, int d, float (&all)[2][32],
                                           const Team& team) {
  const int lane = threadIdx.x % 32, column = chunk * WARP_COLUMNS + lane * EIGHT, chunks = ranges_of(d);
  team.share(all[0], chunk, warp_sum(square_sum(x)), 1);
  const float factor = rms_factor(ordered_sum_32(all[0], chunks), d, next.eps);
  float y[8];
#pragma unroll
  for (int i = 0; i < 8; i++) y[i] = rounded<T>(weight[i] * (x[i] * factor));
  if constexpr (Format::GLOBAL) {
    if (next.own) {
      team.share(all[1], chunk, __uint_as_float(group_max<32>(Format::counted(Format::block_max(y)))), 2);
      u32 most = 0;
      for (int i = 0; i < chunks; i++) most = max(most, __float_as_uint(all[1][i]));
      total = nvfp4_global(most);
      if (column == 0) next.own[token] = total;
    }
  }
  if (column < d) store8(next.y + token * d + column, y, EIGHT, true);
  Format::store(y, total, {next.data, next.scale, d}, token, column);
}

// For a warp that has no chunk: as many barriers as `norm_quant` has.
template <class T, class Format, class Team>
__device__ __forceinline__ void pass_norm_quant(const Next<T>& next, const Team& team) {
  if constexpr (QUANTISED<Format>) team.pass();
  if (Format::GLOBAL && next.own) team.pass();
}

// One token. `partial`: of mhc_mix.cu. Writes x and, as Format says, y and its bytes. M = 0: any number of streams.
template <class T, int M, class Format, bool HEAD>
__device__ __forceinline__ void finish(const T* streams, const float* partial, const Site& site, float norm_eps, T* x,
                                       int d, const Next<T>& next, Scratch<M>& scratch) {
  const int m = M ? M : site.m, n = HEAD ? m : m * (m + 2);
  const int ranges = ranges_of(d), chunks = ranges, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = warp * WARP_COLUMNS + lane * EIGHT;
  const bool there = warp < chunks && column < d;
  const i64 token = blockIdx.x;
  const T* const here = streams + token * m * d + column;
  const Block team{chunks};
  pdl_trigger();
  const float scale = site.scale[lane < m ? lane : 0], base = site.base[lane < m ? lane : 0];
  float weight[8];
  if constexpr (QUANTISED<Format>) load8_shared(weight, next.weight + (there ? column : 0), EIGHT, true);
  const WayBack<HEAD ? 0 : M> way_back(site, warp == chunks);
  if (threadIdx.x < 32) scratch.all[0][threadIdx.x] = 0;
  const RangeSums ranges_sums(partial + token * ranges * (n + 1), ranges, n, blockDim.x / 32);
  ranges_sums.prefetch(), prefetch_line(there ? here : streams);
  pdl_wait();
  const float first = ranges_sums.load(0);
  constexpr bool EARLY = M && sizeof(T) == 2;  // else there are not the registers to hold all streams
  Raw8<T> raw[EARLY ? M : 1];
  if constexpr (EARLY) {
#pragma unroll
    for (int j = 0; j < M; j++) raw[j] = load_eight(here + (i64)j * d, there);
  }
  const float total = Format::GLOBAL && next.total ? *next.total : 1.0f;
  ranges_sums.store(first, scratch.sums);
  __syncthreads();
  const float factor = rms_factor(scratch.sums[n], m * d, norm_eps);
  if constexpr (!HEAD) {
    if (warp == chunks) {
      way_back.run(site, scratch.sums, factor, token, scratch.a);
      pass_norm_quant<T, Format>(next, team);
      return;
    }
  }
  const float pre = sigmoid(logit(scratch.sums[lane < m ? lane : 0], factor, scale, base)) + site.eps;
  float sum[8] = {}, v[8];
#pragma unroll
  for (int j = 0; j < m; j++) {
    const float by = __shfl_sync(ALL_LANES, pre, j);
    if constexpr (!EARLY) raw[0] = load_eight(here + (i64)j * d, there);
    widen(raw[EARLY ? j : 0], v);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = fmaf(by, v[i], sum[i]);
  }
#pragma unroll
  for (int i = 0; i < 8; i++) sum[i] = rounded<T>(sum[i]);
  if (there) store8(x + token * d + column, sum, EIGHT, true);
  if constexpr (QUANTISED<Format>)
    norm_quant<T, Format>(sum, weight, total, next, token, warp, d, scratch.all, team);
}

}  // namespace mhc
