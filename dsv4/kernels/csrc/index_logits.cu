// The Lightning indexer over stored keys: up to 64 heads with every key that a token may see, relu, weights, one sum.
//
// Moves   68 bytes a key (FP4) or 132 (FP8), once for the tokens of a block, and 4 bytes a logit.
// Floor   at 3.0 TB/s: 262,144 keys of one token 6.3 us in FP4, 11.9 in FP8. Of many tokens the products count: 16 kFLOP a
//         key, 137 GFLOP for 1,024 tokens and 8,192 keys, 139 us of FP16 peak.
// Why FP16: mma.sync in E4M3 is an instruction of sm_120a alone. Elsewhere the compiler converts both operands at every
//         product and multiplies in FP16. Converted once they cost less, and FP16 has room for the scales of FP4: products
//         of E2M1 and of E4M3 are exact, and the sums are those of FP32, not the 14 bits of Hopper's E4M3.
// Measured on an H100 (bench/results/2026-11-27-ops-second.jsonl), one token: 262,144 keys 21.3 us in FP4, 23.1 in FP8; 2,048
//         keys 4.2 and 3.3. 64 tokens of 262,144 976 and 1,069.
// Form    32 keys of a warp are the rows of mma.m16n8k16, eight heads its columns. Keys come by cp.async through a ring, 128
//         a stage, and are widened in registers; queries wait in shared memory as operands, for one token or a few. Relu,
//         weight and the sum over heads stay in registers. For one token and FP4 a warp's 32 keys take about 820
//         instructions on sm_90a, 128 of them products: 250 widen, 90 bring the next keys. More tokens share those.
// Order   a lane's columns ascending, all 128 in one chain; heads 8 j + 2 t and 8 j + 2 t + 1, j ascending; then t by two
//         exchanges. So a logit's bits are its own, whatever the width, the batch and the launch.
// Spread  a block has up to `near` tokens that follow each other, and of 128 keys at a time every `spans`-th lot. Tokens of
//         one sequence share its keys; tokens of different sequences take turns.
// Hopper  has a form of its own: index_logits_hopper.cu.
//
// arch: sm_100a sm_103a sm_120a
#include "common/copy.cuh"
#include "common/index_logits_mma.cuh"

namespace index_logits {

constexpr int MOST_NEAR = 4;

// What a thread brings of the keys of a stage: its pieces, and the scales of one key. All pages are looked up at once,
// which they would not be among copies.
template <class L>
struct Bringing {
  static constexpr int PIECES = L::BYTES / 16;
  u32 page[PIECES + 1];

  __device__ static u32 key(int i) { return i < PIECES ? threadIdx.x / PIECES + i * (THREADS / PIECES) : threadIdx.x; }

  __device__ void look_up(const Stored& keys, const i64* pages, u32 first, u32 most) {
    static_assert(KEYS == THREADS);
#pragma unroll
    for (int i = 0; i <= PIECES; i++) {
      const u32 n = first + key(i);
      page[i] = n < most ? *reinterpret_cast<const u32*>(pages + (n >> keys.shift)) : 0;
    }
  }

  __device__ void copy(u8* stage, const Stored& keys, u32 first, u32 most) const {
    const u32 mask = (1u << keys.shift) - 1, piece = threadIdx.x % PIECES;
#pragma unroll
    for (int i = 0; i <= PIECES; i++) {
      const u32 n = first + key(i), slot = n & mask;
      const u8* const from = keys.pages + static_cast<u64>(page[i]) * keys.page_bytes;
      if (i < PIECES) {
        copy_async<16>(stage + place<L>(key(i), piece), from + slot * L::BYTES + piece * 16, n < most);
      } else {
        copy_async<4>(stage + KEYS * L::BYTES + 4 * key(i), from + (L::BYTES << keys.shift) + slot * 4, n < most);
      }
    }
  }
};

// A token's queries and weights to where the lanes look.
template <class L>
__device__ __forceinline__ void widen_queries(uint4* operands, float* weights, const Queries& q, i64 token) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < HEADS * 4 / THREADS; i++) {
    const int head = (threadIdx.x + i * THREADS) / 4;
    const bool there = head < q.heads;
    const i64 row = token * q.heads + (there ? head : 0);
    uint4 pieces[L::PIECES];
#pragma unroll
    for (int j = 0; j < L::PIECES; j++) {
      pieces[j] = reinterpret_cast<const uint4*>(q.data + row * L::BYTES)[L::piece(t, j)];
      if (!there) pieces[j] = make_uint4(0, 0, 0, 0);
    }
    const u32 scales = reinterpret_cast<const u32*>(q.scales)[row];
    lay<L>(operands, pieces, there ? scales : 0, head, t);
    if (t == 0) weights[head] = there ? q.weights[row] * (0.5f * L::factor(scales)) : 0.0f;
  }
}

template <class L>
__device__ __forceinline__ void run(const Queries& q, const Stored& keys, const i64* slots, const i64* visible, int tokens,
                                    int width, int near, int groups, int spans, float* logits) {
  constexpr int STAGE = KEYS * (L::BYTES + 4);
  DYNAMIC_SHARED(uint4, memory);
  __shared__ float weights[MOST_NEAR][HEADS];
  __shared__ int seen[MOST_NEAR];
  uint4* const operands = memory;  // [near][OPERANDS]
  u8* const ring = reinterpret_cast<u8*>(memory + near * OPERANDS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int start = blockIdx.x % groups * near, end = min(tokens, start + near), span = blockIdx.x / groups;
  pdl_trigger();
  pdl_wait();
  for (int first = start; first < end;) {
    const i64 slot = slots[first];
    i64 longest = visible[first];
    int count = 1;
    for (; first + count < end && slots[first + count] == slot; count++) longest = max(longest, visible[first + count]);
    const int most = static_cast<int>(min(longest, static_cast<i64>(width)));
    const i64* const pages = opaque(keys.table + slot * keys.per_row);
    if (first > start) {  // nothing of the tokens before is on its way, and nobody reads it
      copies_done();
      __syncthreads();
    }
    Bringing<L> early[STAGES<L> - 1];
#pragma unroll
    for (int i = 0; i < STAGES<L> - 1; i++)
      early[i].look_up(keys, pages, (span + i * spans) * KEYS, most);
#pragma unroll
    for (int i = 0; i < STAGES<L> - 1; i++) {
      early[i].copy(ring + i * STAGE, keys, (span + i * spans) * KEYS, most);
      copies_commit();
    }
    if (threadIdx.x < count)
      seen[threadIdx.x] = static_cast<int>(min(visible[first + threadIdx.x], static_cast<i64>(width)));
#pragma unroll 1
    for (int i = 0; i < count; i++) widen_queries<L>(operands + i * OPERANDS, weights[i], q, first + i);
    int stage = 0;
    for (int key = span * KEYS; key < width; key += spans * KEYS) {
      copies_wait<STAGES<L> - 2>();
      __syncthreads();  // all have what they copied, and are through with the stage before
      const int next = key + (STAGES<L> - 1) * spans * KEYS;
      if (next < most) {
        Bringing<L> then;
        then.look_up(keys, pages, next, most);
        then.copy(ring + (stage ? stage - 1 : STAGES<L> - 1) * STAGE, keys, next, most);
      }
      copies_commit();
      const int n = key + warp * WARP_KEYS, own = n + 8 * t + g;
      Keys held;
      if (n < most) load<L>(held, ring + stage * STAGE, warp * WARP_KEYS, g, t);
#pragma unroll 1
      for (int i = 0; i < count; i++) {
        float found = 0;
        if (n < seen[i]) found = logit(held, operands + i * OPERANDS, weights[i], q.heads, lane);
        if (own < width)
          logits[static_cast<i64>(first + i) * width + own] = own < seen[i] ? found : __uint_as_float(SIGN | INFINITY_BITS);
      }
      if (++stage == STAGES<L>) stage = 0;
    }
    first += count;
  }
}

}  // namespace index_logits

#define INDEX_LOGITS(NAME, L, BLOCKS)                                                                             \
  extern "C" __global__ void __launch_bounds__(index_logits::THREADS, BLOCKS) NAME(                               \
      const u8* q, const u8* q_scales, const float* weights, int heads, const u8* pages, int page_bytes, int shift,          \
      const i64* table, i64 per_row, const i64* slots, const i64* visible, int tokens, int width, int near,       \
      int groups, int spans, float* logits) {                                                                     \
    index_logits::run<index_logits::L>({q, q_scales, weights, heads},                                                    \
                                       {pages, static_cast<u32>(page_bytes), shift, table, per_row}, slots,       \
                                       visible, tokens, width, near, groups, spans, logits);                      \
  }

INDEX_LOGITS(index_logits_fp4, Fp4, 4)
INDEX_LOGITS(index_logits_fp8, Fp8, 3)
