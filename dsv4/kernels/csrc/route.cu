// Scores of experts from the router's logits, the k best of them or those that are given, and their weights.
//
// Moves   a token's logits once, 1 KB: latency.
// Form    one warp a token. It is a launch of its own behind the product (matmul_few.cu): a token's scores come from
//         blocks on many multiprocessors, more than a cluster has, and a last block that counts the others would need a
//         counter that survives the call.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/best.cuh"

constexpr int WARPS = 4;

// sqrt(ln(1 + e^x)), as dsv4/ops/moe.py has it.
__device__ __forceinline__ float score(float x) { return sqrtf(x > 20.0f ? x : log1pf(expf(x))); }

struct Routed {
  const float* logits;  // [tokens, experts]
  const float* bias;    // [experts] or none
  const i64* chosen;    // [tokens, k] or none
  float scale;
  i64* experts;  // [tokens, k]
  float* weights;
  int tokens, count, k;
};

// M: experts of a lane, at most.
template <int M>
__device__ __forceinline__ void route(const Routed& r, float (&scores)[WARPS * M * 32]) {
  pdl_trigger();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = blockIdx.x * WARPS + warp;
  float* const own = scores + warp * M * 32;
  pdl_wait();
  if (token >= r.tokens) return;
  const float* const from = r.logits + static_cast<i64>(token) * r.count;
  i64 expert = 0;  // lane i has the i-th choice
  u64 keys[M];
#pragma unroll
  for (int m = 0; m < M; m++) {
    const int e = m * 32 + lane;
    const bool there = e < r.count;
    const float s = there ? score(from[e]) : 0.0f;
    own[e] = s;
    keys[m] = there ? best_key(r.bias ? s + r.bias[e] : s, e) : 0;
  }
  __syncwarp();
  if (r.chosen) {
    if (lane < r.k) expert = r.chosen[static_cast<i64>(token) * r.k + lane];
  } else {
    each_best(keys, r.k, [&](int i, u64 key) { expert = lane == i ? key_index(key) : expert; });
  }
  const bool known = static_cast<u64>(expert) < static_cast<u64>(r.count);
  const float weight = lane < r.k ? (known ? own[expert] : __uint_as_float(0x7FFFFFFFu)) : 0.0f;
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < r.k; i++) sum += __shfl_sync(ALL_LANES, weight, i);
  if (lane >= r.k) return;
  const i64 at = static_cast<i64>(token) * r.k + lane;
  r.experts[at] = expert;
  r.weights[at] = weight / sum * r.scale;
}

#define ROUTE(M)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(128)                                                                \
      route_##M(const float* logits, const float* bias, const i64* chosen, float scale, i64* experts, float* weights, \
                int tokens, int count, int k) {                                                                    \
    __shared__ float scores[WARPS * M * 32];                                                                       \
    route<M>({logits, bias, chosen, scale, experts, weights, tokens, count, k}, scores);                           \
  }

ROUTE(8)
ROUTE(12)
ROUTE(16)
