// A token's experts by its logits, by one warp: scores, the k best of them or those that are given, and their weights.
#pragma once
#include "common/best.cuh"

// sqrt(ln(1 + e^x)), as dsv4/ops/moe.py has it.
__device__ __forceinline__ float score(float x) { return sqrtf(x > 20.0f ? x : log1pf(expf(x))); }

struct Routing {
  const float* bias;  // [count] or none
  float scale;
  i64* experts;  // [tokens, k]
  float* weights;
  int count, k;
};

// M: experts of a lane, at most. logits: of the token; chosen: its experts or none; scores: room for M * 32.
template <int M>
__device__ __forceinline__ void choose(const Routing& r, i64 token, const float* logits, const i64* chosen, float* scores) {
  const int lane = threadIdx.x % 32;
  i64 expert = 0;  // lane i has the i-th choice
  u64 keys[M];
#pragma unroll
  for (int m = 0; m < M; m++) {
    const int e = m * 32 + lane;
    const bool there = e < r.count;
    const float s = there ? score(logits[e]) : 0.0f;
    scores[e] = s;
    keys[m] = there ? best_key(r.bias ? s + r.bias[e] : s, e) : 0;
  }
  __syncwarp();
  if (chosen) {
    if (lane < r.k) expert = chosen[lane];
  } else {
    each_best(keys, r.k, [&](int i, u64 key) { expert = lane == i ? key_index(key) : expert; });
  }
  const bool known = static_cast<u64>(expert) < static_cast<u64>(r.count);
  const float weight = lane < r.k ? (known ? scores[expert] : __uint_as_float(0x7FFFFFFFu)) : 0.0f;
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < r.k; i++) sum += __shfl_sync(ALL_LANES, weight, i);
  if (lane >= r.k) return;
  const i64 at = token * r.k + lane;
  r.experts[at] = expert;
  r.weights[at] = weight / sum * r.scale;
}
