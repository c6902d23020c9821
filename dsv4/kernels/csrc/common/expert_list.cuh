// Few tokens: every block finds by itself who goes to which expert, and has all tokens before it.
//
// A group is an expert and one choice of it by each token at most: column t of a group is token t, or nobody. A token that
// chose an expert twice is in two groups of it. The shared expert's group, of all tokens, is the first.
#pragma once
#include "common/formats.cuh"
#include "common/wgmma.cuh"

constexpr int FEW = 8, MOST_CHOICES = 8, MOST_PAIRS = FEW * MOST_CHOICES, MOST_LISTED = MOST_PAIRS + 1;
constexpr int NOBODY = 0x7FFFFFFF;

struct alignas(16) List {
  int4 group[MOST_LISTED];
  int pair[MOST_LISTED][FEW];
  float weight[MOST_LISTED][FEW];
  int key[MOST_PAIRS];  // expert and which choice of it, of the first pair that has both; else NOBODY
  int total;
};

// All threads of a block; chosen, route [tokens, k].
__device__ __forceinline__ void make_list(List& list, const i64* chosen, const float* route, int tokens, int k,
                                          int experts) {
  const int pairs = tokens * k, p = threadIdx.x;
  for (int i = p; i < MOST_LISTED * FEW; i += blockDim.x)
    list.pair[i / FEW][i % FEW] = -1, list.weight[i / FEW][i % FEW] = 0;
  int own = NOBODY, smaller = 0;
  bool first = true;
  if (p < pairs) {
    const int token = p / k, slot = p - token * k;
    const i64* const mine = chosen + token * k;
    const int expert = static_cast<int>(mine[slot]);
    int again = 0;
    for (int s = 0; s < k; s++) {
      const int other = static_cast<int>(mine[s]);
      again += other == expert && s < slot;
      smaller += other < expert || (other == expert && s < slot);
    }
    own = expert * MOST_PAIRS + again;
    list.key[p] = own;
  }
  __syncthreads();
  for (int q = 0; q < min(p, pairs); q++) first = first && list.key[q] != own;
  __syncthreads();
  if (p < pairs && !first) list.key[p] = NOBODY;
  __syncthreads();
  int before = 1, total = 1;
  for (int q = 0; q < pairs; q++) {
    const int key = list.key[q];
    before += key < own, total += key != NOBODY;
  }
  if (p < pairs) {
    const int token = p / k;
    list.pair[before][token] = token * (k + 1) + smaller, list.weight[before][token] = route[p];
    if (first) list.group[before] = make_int4(own / MOST_PAIRS, before, 1, FEW);
  }
  if (p < tokens) list.pair[0][p] = p * (k + 1) + k, list.weight[0][p] = 1;
  if (p == 0) list.group[0] = make_int4(experts, 0, 1, FEW), list.total = total;
  __syncthreads();
}

// The columns of all tokens, as `expert_tokens` lays out a group; x [tokens, blocks, 128]. By THREADS threads.
template <int THREADS>
__device__ __forceinline__ void lay_out(u8* image, float* scales, const u8* x, const u8* x_scale, int tokens,
                                        int blocks) {
  for (int i = threadIdx.x; i < blocks * FEW * 8; i += THREADS) {
    const int b = i / (FEW * 8), n = i / 8 % FEW, piece = i % 8;
    uint4 words = make_uint4(0, 0, 0, 0);
    if (n < tokens) {
      const u32* const from = reinterpret_cast<const u32*>(x + (static_cast<i64>(n) * blocks + b) * ROW_BYTES);
      words = make_uint4(from[piece], from[8 + piece], from[16 + piece], from[24 + piece]);
    }
    *reinterpret_cast<uint4*>(image + (b * FEW + n) * ROW_BYTES + 16 * (piece ^ n)) = words;
  }
  for (int i = threadIdx.x; i < blocks * FEW; i += THREADS) {
    const int n = i % FEW;
    scales[i] = n < tokens ? ue8m0_float(x_scale[static_cast<i64>(n) * blocks + i / FEW]) : 0.0f;
  }
  fence_shared();
  meet<THREADS>(1);
}
