// In front of the experts and behind them: who goes to which expert, and the sum over a token's experts.
//
// expert_tokens  The tokens of an expert, ascending, in groups of at most `wide`; the groups of the shared expert, which
//                has all tokens, then those of ascending experts. A group's tokens are laid out as common/experts.cuh
//                copies them: of every 128 columns `wide` rows of 128 bytes. Their words of four columns are dealt out,
//                word 8 t + p to piece p and there to word t, for so the packed weights have them
//                (dsv4/quant/packed.py), and piece p of row n lies at p ^ (n % 8). Beside them the scales as numbers.
// expert_sum     In FP32, by ascending expert, the shared one last.
//
// Moves   6 tokens of 4 KB for one of Flash: nothing; 8,192 tokens: 200 MB read, 267 MB written.
// Form    A block an expert, each of which counts for itself, so that nobody waits for another block. The shared expert's
//         tokens, all of them, are laid out by as many blocks as are left over: where they go needs no counting.
// Tried   one block for the shared expert: 3,731 us for 8,192 tokens on an H100, 20 for 64.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/vector.cuh"

constexpr int MOST_EXPERTS = 1024, THREADS = 512, WARPS = THREADS / 32;
constexpr int KEPT = 1024;  // pairs of an expert that are remembered where they can be read at once

__device__ __forceinline__ int lanes_sum(int v) {
#pragma unroll
  for (int other = 16; other; other >>= 1) v += __shfl_xor_sync(ALL_LANES, v, other);
  return v;
}

// Who goes to an expert: its number of tokens, and the first of its groups.
struct Own {
  int count, first;
};

// Writes an expert's groups and pairs, and the number of all groups if it is the shared one. kept: its first tokens.
__device__ __forceinline__ Own listed(const i64* chosen, const float* route, int tokens, int k, int experts, int wide,
                                      int* total, int* group, int* pair, float* weight, int* kept) {
  __shared__ int count[MOST_EXPERTS + 1], before[WARPS], all[WARPS], own[WARPS];
  const int expert = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, pairs = tokens * k, ways = k + 1;
  const bool shared = expert == experts;
  for (int e = threadIdx.x; e < experts; e += THREADS) count[e] = 0;
  if (threadIdx.x == 0) count[experts] = tokens;
  __syncthreads();
  pdl_wait();
  // A run of pairs is a warp's: what it finds stands in order.
  const int share = (pairs + THREADS - 1) / THREADS * 32, start = min(warp * share, pairs);
  const int end = min(start + share, pairs);
  int mine = 0;
  for (int p = start + lane; p - lane < end; p += 32) {
    const int e = p < end ? static_cast<int>(chosen[p]) : -1;
    if (e >= 0) atomicAdd(&count[e], 1);
    mine += __popc(__ballot_sync(ALL_LANES, e == expert));
  }
  if (lane == 0) own[warp] = mine;
  __syncthreads();
  int in_front = 0, sum = 0;
  for (int e = threadIdx.x; e <= experts; e += THREADS) {
    const int groups = (count[e] + wide - 1) / wide;
    in_front += !shared && (e < expert || e == experts) ? groups : 0, sum += groups;
  }
  in_front = lanes_sum(in_front), sum = lanes_sum(sum);
  if (lane == 0) before[warp] = in_front, all[warp] = sum;
  __syncthreads();
  int first = 0, rank = 0;
  sum = 0;
  for (int w = 0; w < WARPS; w++) first += before[w], sum += all[w], rank += w < warp ? own[w] : 0;
  if (shared && threadIdx.x == 0) *total = sum;
  const int groups = (count[expert] + wide - 1) / wide;
  for (int i = threadIdx.x; i < groups; i += THREADS)
    reinterpret_cast<int4*>(group)[first + i] = make_int4(expert, first, groups, count[expert]);
  const i64 place = static_cast<i64>(first) * wide;
  for (int i = count[expert] + threadIdx.x; i < groups * wide; i += THREADS) pair[place + i] = -1, weight[place + i] = 0;
  if (shared) {
    for (int t = threadIdx.x; t < tokens; t += THREADS) pair[t] = t * ways + k, weight[t] = 1;
  }
  for (int p = start + lane; p - lane < end && !shared; p += 32) {
    const bool found = p < end && chosen[p] == expert;
    const u32 with = __ballot_sync(ALL_LANES, found);
    if (found) {
      const int token = p / k, slot = p - token * k;
      int smaller = 0;
      for (int s = 0; s < k; s++) {
        const i64 other = chosen[static_cast<i64>(token) * k + s];
        smaller += other < expert || (other == expert && s < slot);
      }
      const int member = rank + __popc(with & ((1u << lane) - 1));
      pair[place + member] = token * ways + smaller, weight[place + member] = route[p];
      if (member < KEPT) kept[member] = token;
    }
    rank += __popc(with);
  }
  __syncthreads();
  return {count[expert], first};
}

// chosen [tokens, k], route [tokens, k]; x [tokens, blocks, 128], x_scale [tokens, blocks]. Block `experts` is the shared
// one's, and those behind it help it. total: how many groups there are. group [groups, 4]: expert, the first group of that
// expert, how many groups and how many tokens it has. pair [groups, wide]: token * (k + 1) + its place among the token's
// experts, -1 for nobody; weight alike; image [groups, blocks, wide, 128] and scale [groups, blocks, wide].
extern "C" __global__ void __launch_bounds__(512, 2)
    expert_tokens(const i64* chosen, const float* route, const u8* x, const u8* x_scale, int tokens, int k, int blocks,
                  int experts, int wide, int* total, int* group, int* pair, float* weight, u8* image, float* scale) {
  __shared__ int kept[KEPT];
  const bool shared = blockIdx.x >= experts;
  const int helpers = shared ? gridDim.x - experts : 1, helper = shared ? blockIdx.x - experts : 0;
  pdl_trigger();
  Own own{tokens, 0};  // the shared expert's groups are the first
  if (helper == 0) own = listed(chosen, route, tokens, k, experts, wide, total, group, pair, weight, kept);
  if (helper) pdl_wait();
  const i64 place = static_cast<i64>(own.first) * wide;
  // Eight lanes a row of 128 columns: each reads four words, one of every 32 columns, and writes a piece.
  const int piece = threadIdx.x % 8, taken = own.count * blocks, rows = (own.count + wide - 1) / wide * wide * blocks;
  const int start = (helper * THREADS + threadIdx.x) / 8, step = helpers * THREADS / 8;
#pragma unroll 4
  for (int i = start; i < taken; i += step) {
    const int member = i / blocks, b = i - member * blocks, n = member % wide;
    const int token = shared ? member : member < KEPT ? kept[member] : pair[place + member] / (k + 1);
    const i64 from = static_cast<i64>(token) * blocks + b;
    const u32* const source = reinterpret_cast<const u32*>(x + from * 128);
    const uint4 words = make_uint4(source[piece], source[8 + piece], source[16 + piece], source[24 + piece]);
    const i64 to = (place + member - n) * blocks + b * wide + n;
    *reinterpret_cast<uint4*>(image + to * 128 + 16 * (piece ^ (n & 7))) = words;
    if (piece == 0) scale[to] = ue8m0_float(x_scale[from]);
  }
  for (int i = taken + start; i < rows; i += step) {
    const int member = i / blocks, b = i - member * blocks, n = member % wide;
    const i64 to = (place + member - n) * blocks + b * wide + n;
    *reinterpret_cast<uint4*>(image + to * 128 + 16 * piece) = make_uint4(0, 0, 0, 0);
    if (piece == 0) scale[to] = 0;
  }
}

// y [tokens, ways, n], in the order of the sum; out [tokens, n]. n is a multiple of 8.
extern "C" __global__ void __launch_bounds__(256) expert_sum_bf16(const bf16* y, int ways, int n, int rows, bf16* out) {
  pdl_trigger();
  pdl_wait();
  const i64 at = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x, token = at / (n / 8);
  const int column = static_cast<int>(at % (n / 8)) * 8;
  if (token >= rows) return;
  float sum[8], v[8];
  Raw8<bf16> raw;
  for (int e = 0; e < ways; e++) {
    load_whole(raw, y + (token * ways + e) * n + column);
    widen(raw, v);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = e ? sum[i] + v[i] : v[i];
  }
  pack(raw, sum);
  store_whole(out + token * n + column, raw);
}
