// The k best logits of each token: of 2,048 at a time, then of these, until one block has all that is left.
//
// Moves   129,280 logits a token once, 0.5 MB, mostly out of the second cache: the head has just written them.
// Form    a block has eight warps with eight keys a lane; each finds its k best, the first warp those of all eight. Two
//         launches for a vocabulary of 129,280, which keep nothing from one call to the next.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/best.cuh"

constexpr int WARPS = 8, KEYS = 8, PART = WARPS * 32 * KEYS, MOST = 32;

// Of a block's keys the k best, into `found` where there is a second round.
__device__ __forceinline__ void block_best(u64 (&keys)[KEYS], int k, u64 (&left)[WARPS * MOST]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  each_best(keys, k, [&](int i, u64 key) {
    if (lane == 0) left[warp * MOST + i] = key;
  });
  __syncthreads();
#pragma unroll
  for (int i = 0; i < KEYS; i++) keys[i] = lane < k ? left[i * MOST + lane] : 0;  // warp i's k best, one a lane
}

// found: [tokens, parts, k]. values and ids: [tokens, k], where there is one part.
struct Found {
  u64* found;
  float* values;
  i64* ids;
  const float* logits;
  i64 stride;
  int k, parts;

  __device__ void write(u64 (&keys)[KEYS], int token, int part) const {
    if (threadIdx.x >= 32) return;
    each_best(keys, k, [&](int i, u64 key) {
      if (threadIdx.x != 0) return;
      const i64 at = (static_cast<i64>(token) * parts + part) * k + i;
      if (found) {
        found[at] = key;
      } else {
        ids[at] = key_index(key);
        values[at] = logits[token * stride + key_index(key)];
      }
    });
  }
};

// Keys of a token's part, from wherever `key_at` finds them, and the best of them to where they go.
template <class KeyAt>
__device__ __forceinline__ void best(int n, int part, int token, const Found& to, const KeyAt& key_at) {
  __shared__ u64 left[WARPS * MOST];
  u64 keys[KEYS];
#pragma unroll
  for (int i = 0; i < KEYS; i++) {
    const int at = part * PART + i * 256 + static_cast<int>(threadIdx.x);
    keys[i] = at < n ? key_at(at) : 0;
  }
  block_best(keys, to.k, left);
  to.write(keys, token, part);
}

extern "C" __global__ void __launch_bounds__(256)
    best_first(const float* logits, i64 stride, int n, int k, int parts, u64* found, float* values, i64* ids) {
  pdl_trigger();
  pdl_wait();
  const int token = blockIdx.x / parts, part = blockIdx.x % parts;
  best(n, part, token, {found, values, ids, logits, stride, k, parts},
       [&](int at) { return best_key(logits[token * stride + at], at); });
}

// keys: [tokens, n] of the round before.
extern "C" __global__ void __launch_bounds__(256) best_next(
    const u64* before, const float* logits, i64 stride, int n, int k, int parts, u64* found, float* values, i64* ids) {
  pdl_trigger();
  pdl_wait();
  const int token = blockIdx.x / parts, part = blockIdx.x % parts;
  best(n, part, token, {found, values, ids, logits, stride, k, parts},
       [&](int at) { return before[static_cast<i64>(token) * n + at]; });
}
