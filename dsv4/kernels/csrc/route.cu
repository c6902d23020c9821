// Scores of experts from the router's logits, the k best of them or those that are given, and their weights.
//
// Moves   a token's logits once, 1 KB: latency.
// Form    one warp a token. It is a launch of its own behind the product (matmul_few.cu), for any number of tokens and
//         experts; route_cluster.cu does both for a few.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/route.cuh"

constexpr int WARPS = 4;

// M: experts of a lane, at most.
template <int M>
__device__ __forceinline__ void route(const Routing& r, const float* logits, const i64* chosen, int tokens,
                                      float (&scores)[WARPS * M * 32]) {
  pdl_trigger();
  const int warp = threadIdx.x / 32, token = blockIdx.x * WARPS + warp;
  pdl_wait();
  if (token >= tokens) return;
  const i64 at = token;
  choose<M>(r, at, logits + at * r.count, chosen ? chosen + at * r.k : nullptr, scores + warp * M * 32);
}

#define ROUTE(M)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(128)                                                                \
      route_##M(const float* logits, const float* bias, const i64* chosen, float scale, i64* experts, float* weights, \
                int tokens, int count, int k) {                                                                    \
    __shared__ float scores[WARPS * M * 32];                                                                       \
    route<M>({bias, scale, experts, weights, count, k}, logits, chosen, tokens, scores);                           \
  }

ROUTE(8)
ROUTE(12)
ROUTE(16)
