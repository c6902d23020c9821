// The way back of mHC: stream k becomes post_k y + sum_j comb_jk stream_j, for all columns at once.
//
// arch: sm_90a sm_100a sm_103a sm_120a
//
// Moves 2 (2 M + 1) d bytes a token in BF16: 604 MB for 8,192 tokens of Flash; floor 180 us at 3.35 TB/s (a copy
// reaches about nine tenths of that). A thread has eight columns: five 16-byte loads in flight before the first use,
// about 64 registers, so that a multiprocessor has 1,024 threads and 80 KB in flight, twice what its share of the
// bandwidth needs to cover 800 ns. comb and post of a token are 80 bytes that all its threads read through the first
// cache.
//
// Measured on an H100: 205 us for 8,192 tokens of Flash, 0.99 of a copy; one token 1.5 us.
#include "common/mhc.cuh"

namespace mhc {

constexpr int POST_THREADS = 256;

struct Eight {
  float v[8];
};
__device__ __forceinline__ Eight scaled_sum(float by, const Eight& a, Eight sum) {
#pragma unroll
  for (int i = 0; i < 8; i++) sum.v[i] = fmaf(by, a.v[i], sum.v[i]);
  return sum;
}

// M = 0: any number of streams, read again for each of those that are written.
template <class T, int M>
__device__ __forceinline__ void post(const T* y, const T* before, const float* gates, const float* comb, T* streams,
                                     int tokens, int d, int m) {
  pdl_trigger();
  const u32 width = d / EIGHT, unit = blockIdx.x * POST_THREADS + threadIdx.x;
  const i64 token = unit / width, column = unit % width * EIGHT;
  const i64 start = token * m * d + column;
  pdl_wait();
  if (unit >= width * tokens) return;
  Raw8<T> raw[M ? M : 1], own = load_eight(y + token * d + column, true);
  if constexpr (M > 0) {
#pragma unroll
    for (int j = 0; j < M; j++) raw[j] = load_eight(before + start + (i64)j * d, true);
  }
  const auto stream = [&](int j) {
    Eight found;
    if constexpr (M > 0) {
      widen(raw[j], found.v);
    } else {
      widen(load_eight(before + start + (i64)j * d, true), found.v);
    }
    return found;
  };
  float to[M ? M : 1], from[M ? M : 1][M ? M : 1];  // post and comb, in loads of four
  if constexpr (M == 4) {
    const float4 g = load_quad(gates + token * 4);
    to[0] = g.x, to[1] = g.y, to[2] = g.z, to[3] = g.w;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float4 c = load_quad(comb + token * 16 + 4 * j);
      from[j][0] = c.x, from[j][1] = c.y, from[j][2] = c.z, from[j][3] = c.w;
    }
  }
  Eight wide;
  widen(own, wide.v);
#pragma unroll
  for (int k = 0; k < m; k++) {
    const auto weight = [&](int j) { return M ? from[M ? j : 0][M ? k : 0] : comb[(token * m + j) * m + k]; };
    const Eight found = written_back(wide, M ? to[M ? k : 0] : gates[token * m + k], m, weight, stream);
    store8(streams + start + (i64)k * d, found.v, EIGHT, true);
  }
}

}  // namespace mhc

#define POST(name, T, M)                                                                                         \
  extern "C" __global__ void __launch_bounds__(mhc::POST_THREADS)                                                \
      name(const T* y, const T* before, const float* post, const float* comb, T* streams, int tokens, int d, int m) { \
    mhc::post<T, M>(y, before, post, comb, streams, tokens, d, M ? M : m);                                       \
  }

POST(mhc_post_bf16, bf16, 4)
POST(mhc_post_float, float, 4)
POST(mhc_post_any_bf16, bf16, 0)
POST(mhc_post_any_float, float, 0)
