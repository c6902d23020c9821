// A token of each row of logits, with noise that a key gives every token: of 1,024 logits at a time, then of these.
//
// Moves   129,280 logits a row once, 0.5 MB, mostly out of the second cache: the head has just written them.
// Form    sample_parts: a block a part of a row, four logits a thread. sample_join: a warp a row.
// Noise   is FP64 and takes two logarithms. The leading ones of a token's random bits bound it, so that only a token which
//         could still be its thread's best pays for them.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/device.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, EACH = 4, PART = EACH * THREADS;
constexpr u64 GAMMA = 0x9E3779B97F4A7C15ull;

__device__ __forceinline__ u64 mixed(u64 x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// What is known of some logits of a row.
struct Best {
  double score;
  int token;
  u64 mark;
  u32 finite;  // bool
};

// Of equal scores the lower token's.
__device__ __forceinline__ Best better(const Best& a, const Best& b) {
  const bool other = b.score > a.score || (b.score == a.score && b.token < a.token);
  return {other ? b.score : a.score, other ? b.token : a.token, a.mark + b.mark, a.finite & b.finite};
}

__device__ __forceinline__ Best best_of_warp(Best mine) {
#pragma unroll
  for (int apart = 16; apart; apart /= 2) {
    const Best other{__shfl_xor_sync(ALL_LANES, mine.score, apart), __shfl_xor_sync(ALL_LANES, mine.token, apart),
                     __shfl_xor_sync(ALL_LANES, mine.mark, apart), __shfl_xor_sync(ALL_LANES, mine.finite, apart)};
    mine = better(mine, other);
  }
  return mine;
}

constexpr int NOBODY = 0x7FFFFFFF;  // loses to every token, also where all logits are minus infinity
__device__ __forceinline__ Best nothing() { return {-static_cast<double>(__int_as_float(0x7F800000)), NOBODY, 0, 1}; }

// temperature: 0 takes the largest logit. The last of `better` keeps the lower token, as tokens come in their order.
__device__ __forceinline__ void look(Best& best, float logit, int token, double temperature, u64 key) {
  const u32 bits = __float_as_uint(logit);
  best.mark += static_cast<u64>(static_cast<i64>(static_cast<int>(bits))) * (2 * static_cast<u64>(token) + 1) * GAMMA;
  best.finite &= (bits & 0x7F800000) != 0x7F800000;
  double score = logit != logit ? nothing().score : static_cast<double>(logit);
  if (temperature != 0) {
    const u64 random = mixed(key + (static_cast<u64>(token) + 1) * GAMMA);
    score /= temperature;
    // u < 1 - 2^-(n + 1) where n bits lead: -log(u) > 2^-(n + 1).
    if (score + 0.6931471805599455 * (__clzll(static_cast<i64>(~random)) + 1) < best.score) return;
    const double u = (static_cast<double>(random >> 12) + 0.5) * 0x1p-52;
    score -= log(-log(u));
  }
  if (score > best.score || best.token == NOBODY) best.score = score, best.token = token;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sample_parts(const float* logits, i64 stride, int n, int parts, const double* temperatures, const i64* keys, double* scores,
                 int* tokens, u64* marks, int* finite) {
  __shared__ double block_scores[WARPS];
  __shared__ int block_tokens[WARPS];
  __shared__ u64 block_marks[WARPS];
  __shared__ u32 block_finite[WARPS];
  pdl_trigger();
  pdl_wait();
  const int row = blockIdx.x / parts, part = blockIdx.x - row * parts, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const double temperature = temperatures[row] == 0 ? 0 : fmax(temperatures[row], 1e-200);
  const float* const own = logits + row * stride;
  const u64 key = static_cast<u64>(keys[row]);
  const int first = part * PART + static_cast<int>(threadIdx.x);
  float mine[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) mine[i] = own[min(first + i * THREADS, n - 1)];
  Best best = nothing();
#pragma unroll
  for (int i = 0; i < EACH; i++)
    if (first + i * THREADS < n) look(best, mine[i], first + i * THREADS, temperature, key);
  best = best_of_warp(best);
  if (lane == 0)
    block_scores[warp] = best.score, block_tokens[warp] = best.token, block_marks[warp] = best.mark, block_finite[warp] = best.finite;
  __syncthreads();
  if (threadIdx.x) return;
  for (int i = 1; i < WARPS; i++) best = better(best, {block_scores[i], block_tokens[i], block_marks[i], block_finite[i]});
  scores[blockIdx.x] = best.score, tokens[blockIdx.x] = best.token;
  marks[blockIdx.x] = best.mark, finite[blockIdx.x] = static_cast<int>(best.finite);
}

extern "C" __global__ void __launch_bounds__(32)
    sample_join(const double* scores, const int* tokens, const u64* marks, const int* finite, int parts, i64* token, i64* mark,
                u8* whole) {
  pdl_trigger();
  pdl_wait();
  Best best = nothing();
  for (int part = threadIdx.x; part < parts; part += 32) {
    const int at = blockIdx.x * parts + part;
    best = better(best, {scores[at], tokens[at], marks[at], static_cast<u32>(finite[at])});
  }
  best = best_of_warp(best);
  if (threadIdx.x) return;
  token[blockIdx.x] = best.token, mark[blockIdx.x] = static_cast<i64>(best.mark), whole[blockIdx.x] = static_cast<u8>(best.finite);
}
