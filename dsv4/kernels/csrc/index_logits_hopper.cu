// The Lightning indexer over stored keys on Hopper: up to 64 heads with every key that a token may see, relu, weights,
// one sum.
//
// Moves   68 bytes a key (FP4) or 132 (FP8), once for the tokens of a block, and 4 bytes a logit.
// Floor   at 3.0 TB/s: 262,144 keys of one token 6.3 us in FP4, 11.9 in FP8. Of many tokens the products count: 16
//         kFLOP a key, 137 GFLOP for 1,024 tokens and 8,192 keys, 139 us of FP16 peak.
// Why FP16: products of E2M1 and of E4M3 are exact there, it has room for the scales of FP4, and the sums are those of
//         FP32, not the 14 bits that Hopper gives to products of E4M3.
// Measured on an H100 (bench/results/2026-11-28-index-logits.jsonl; in brackets by mma.sync in the same run), one
//         token: 262,144 keys 14.2 us in FP4 (21.3) and 18.7 in FP8 (21.8); 65,536 keys 5.7 (8.0) and 6.9 (10.3); 2,048
//         keys 2.8 (4.1) and 2.6 (3.5). 64 tokens of 262,144 628 (1,000) and 853 (1,051), the latter 92 % of a copy's
//         speed. 1,024 tokens and 8,192 keys 216 (464) and 220 (436).
// Limit   32 keys of a warp take about 550 instructions in FP4 (820 by mma.sync), 360 in FP8: 16 products, 240 or 64
//         that widen, 128 that add up. 512 keys in FP4 take about 4,300 cycles: the tensor cores have 2,048, a
//         scheduler issues in 2,190, and hardly anything of both is at the same time.
// Tried   three stages: in FP4 11 % longer for one token of 262,144 keys, four 22 %; in FP8, with fewer warpgroups that
//         they have room, three 9 %, four 12 %. Two or three warpgroups, in one block or two, or one in each of four:
//         FP4 3 to 15 % longer; FP8 3 % shorter for one token of 262,144 keys, else up to 7 % longer. Warpgroups that
//         give their products in turn, by barriers: up to 6 % longer, 2,048 keys 13. Halves of a stage, each waited for
//         and replaced alone: FP8 2 % longer, FP4 as long. None changes a bit.
// Form    128 keys of a warpgroup are twice the rows of m64n64k16, from registers; a token's heads are the columns, in
//         shared memory. Each lane brings by cp.async what it multiplies itself, its pieces of four keys that lie
//         together in a page: so nobody waits for anybody between the first key and the last. One block of four
//         warpgroups to a multiprocessor: while one widens or adds up, others multiply. All that the start has to read
//         is asked for at once.
// Order   eight steps of 16 columns in one chain; heads 8 j + 2 t and 8 j + 2 t + 1, j ascending; then t by two
//         exchanges. So a logit's bits are its own, whatever the width, the batch and the launch.
// Spread  a block has up to `near` tokens that follow each other, and of 128 keys at a time every `spans`-th lot, its
//         warpgroups in turn. Tokens of one sequence share its keys; tokens of different sequences take turns.
//
// arch: sm_90a
#include "common/copy.cuh"
#include "common/index_logits.cuh"
#include "common/wgmma_half.cuh"

namespace index_logits {

constexpr int MOST_NEAR = 4, GROUP = 128, MOST_GROUPS = 4, TILE = 128;
constexpr int HALF = HEADS * ROW_BYTES, QUERIES = 2 * HALF;  // bytes of a token's queries, 64 columns each

// Of a warp. A stage has of each lane the pieces of four keys, and in as much room as one piece their scales, so that
// one address leads to all of them.
template <class L>
struct Ring {
  static constexpr int STAGES = 2;
  static constexpr int PART = 16 * 32, SCALES = 4 * L::PIECES * PART, STAGE = SCALES + PART;
};

using Address = decltype(shared_address(nullptr));

// What belongs to a token: its weights in the order of lanes, four of which lie in as many banks, and how many keys it
// sees.
struct alignas(16) Token {
  float weights[4][20];
  u32 seen;
};

// Where a lane finds its pieces of keys n .. n + 3 and their scales.
template <class L>
struct Source {
  const u8 *data, *scales;  // of page 0
  const i64* pages;         // of the sequence
  u32 page_bytes, mask, shift, known;

  __device__ Source(const Stored& keys, int t)
      : data(opaque(keys.pages + 16 * t)),
        scales(opaque(keys.pages + (L::BYTES << keys.shift))),
        page_bytes(keys.page_bytes),
        mask(opaque((1u << keys.shift) - 1)),
        shift(keys.shift),
        known(opaque(static_cast<u32>(min(keys.per_row, static_cast<i64>(ALL_LANES))))) {}

  __device__ void of(const Stored& keys, i64 row) { pages = opaque(keys.table + row * keys.per_row); }

  // Not beyond the table's end: what stands there behind the last key that is seen may be read, and is nobody's.
  __device__ u32 look_up(u32 n) const {
    const u32 at = n >> shift;
    return at < known ? static_cast<u32>(load8_once(pages + at)) : 0;
  }

  __device__ void bring(u8* to, u32 page, u32 n, bool there) const {
    const u32 slot = n & mask;
    const u8* const from = data + static_cast<u64>(page) * page_bytes + static_cast<u64>(slot) * L::BYTES;
#pragma unroll
    for (int i = 0; i < 4 * L::PIECES; i++)
      copy_async<16>(to + i * Ring<L>::PART, from + i / L::PIECES * L::BYTES + i % L::PIECES * 64, there);
    const u8* const of = scales + static_cast<u64>(opaque(page)) * page_bytes + static_cast<u64>(slot) * 4;
    copy_async<16>(to + Ring<L>::SCALES, of, there);
  }
};

// Rows g and g + 8 of what a lane multiplies, of two keys whose pieces lie at `from`.
template <class L>
__device__ __forceinline__ void load(u32 (&a)[STEPS][4], Address from, u32 by_first, u32 by_second) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint4 own[L::PIECES];
#pragma unroll
    for (int j = 0; j < L::PIECES; j++) own[j] = load_shared16(from + (i * L::PIECES + j) * Ring<L>::PART);
    u32 wide[2 * STEPS];
    L::widen(wide, own, i ? by_second : by_first);
#pragma unroll
    for (int s = 0; s < STEPS; s++) a[s][i] = wide[2 * s], a[s][2 + i] = wide[2 * s + 1];
  }
}

// Lane t's part of the query of a head, on its way; zeros for a head that is not there.
template <class L>
struct Query {
  uint4 pieces[L::PIECES];
  u32 scales;
  float weight;

  __device__ void fetch(const Queries& q, i64 token, int head, int t) {
    const bool there = head < q.heads;
    const i64 row = token * q.heads + (there ? head : 0);
#pragma unroll
    for (int j = 0; j < L::PIECES; j++) pieces[j] = load16_once(q.data + row * L::BYTES + 16 * L::piece(t, j));
    scales = __float_as_uint(load4_once(reinterpret_cast<const float*>(q.scales) + row));
    weight = load4_once(q.weights + row);
    if (there) return;
#pragma unroll
    for (int j = 0; j < L::PIECES; j++) pieces[j] = make_uint4(0, 0, 0, 0);
    scales = 0, weight = 0;
  }

  // To where tensor cores and lanes look.
  __device__ void lay(u8* to, Token& beside, int head, int t) const {
    u32 wide[2 * STEPS];
    L::widen(wide, pieces, L::multiplier(scales, t));
#pragma unroll
    for (int p = 0; p < 2 * STEPS; p++)
      *reinterpret_cast<u32*>(to + p / 8 * HALF + head * ROW_BYTES + 16 * (p % 8 ^ head % 8) + 4 * t) = wide[p];
    if (t == 0) beside.weights[head % 8 / 2][head / 8 * 2 + head % 2] = weight * (0.5f * L::factor(scales));
  }
};

// A lane's part of the logits of its two rows. `weights`: half those of its heads, each times the factor of its query.
__device__ __forceinline__ void multiply(float (&sum)[2], const u32 (&a)[STEPS][4], u64 b, Address weights) {
  float d[HEADS / 2];
  wgmma_fence();
#pragma unroll
  for (int s = 0; s < STEPS; s++)
    wgmma_half(d, a[s], operand_beyond(b, s / (STEPS / 2) * HALF + s % (STEPS / 2) * 32), s > 0);
  wgmma_commit();
  uint4 words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) words[i] = load_shared16(weights + 16 * i);
  wgmma_wait<0>();
#pragma unroll
  for (int s = 0; s < STEPS; s++) hold(a[s]);
#pragma unroll
  for (int j = 0; j < HEADS / 8; j++) {
    const uint4& four = words[j / 2];
    const float even = __uint_as_float(j % 2 ? four.z : four.x), odd = __uint_as_float(j % 2 ? four.w : four.y);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i / 2] = fmaf(twice_relu(d[4 * j + i]), i % 2 ? odd : even, sum[i / 2]);
  }
}

// Of four sums that the lanes of a quad have parts of, the one of this lane.
__device__ __forceinline__ float gathered(const float (&low)[2], const float (&high)[2], int t) {
  const float a = (t & 1 ? low[1] : low[0]) + __shfl_xor_sync(ALL_LANES, t & 1 ? low[0] : low[1], 1);
  const float b = (t & 1 ? high[1] : high[0]) + __shfl_xor_sync(ALL_LANES, t & 1 ? high[0] : high[1], 1);
  return (t & 2 ? b : a) + __shfl_xor_sync(ALL_LANES, t & 2 ? a : b, 2);
}

template <class L>
__device__ __forceinline__ void run(const Queries& q, const Stored& keys, int rows, const i64* slots, const i64* visible,
                                    int tokens, int width, int near, int groups, int spans, float* logits) {
  constexpr int COUNT = Ring<L>::STAGES, STAGE = Ring<L>::STAGE, TOKEN = sizeof(Token), SEEN = sizeof(Token::weights);
  DYNAMIC_SHARED(__align__(1024) u8, memory);  // queries [near][QUERIES], then the rings of the warps
  __shared__ Token beside[MOST_NEAR];
  const int t = threadIdx.x % 4, team = blockDim.x / GROUP;
  u8* const ring = memory + near * QUERIES + threadIdx.x / 32 * (COUNT * STAGE) + threadIdx.x % 32 * 16;
  const Address ring_at = kept_address(ring), seen_at = shared_address(beside) + SEEN,
                weights_at = kept_address(beside[0].weights[t]);
  const int start = blockIdx.x % groups * near, end = min(tokens, start + near), span = blockIdx.x / groups;
  const u32 stride = spans * team * TILE, begin = (span + threadIdx.x / GROUP * spans) * TILE;
  const u32 own = threadIdx.x % GROUP / 4 * 4;  // of a tile: the first of four keys that the lanes of a quad multiply
  // Plus nothing, which the compiler does not know: of an operand whose upper word it knows it makes the next by three
  // instructions, else by one.
  const u64 queries = operand_at(shared_address(memory)) + (static_cast<u64>(q.heads >> 30) << 32);
  Source<L> source(keys, t);
  pdl_trigger();
  pdl_wait();
  for (int first = start; first < end;) {
    // In a step of one token a sequence its row is known before it is read.
    const int guess = first < rows ? first : 0;
    source.of(keys, guess);
    const i64 slot = load8_once(slots + first);
    i64 longest = load8_once(visible + first);
    u32 page[COUNT + 1];
#pragma unroll
    for (int i = 0; i <= COUNT; i++) page[i] = source.look_up(begin + own + i * stride);
    const i64 limit = load8_once(visible + min(first + static_cast<int>(threadIdx.x), end - 1));
    int item = threadIdx.x / 4;  // of the heads of tokens that follow each other
    Query<L> one;
    one.fetch(q, min(first + item / HEADS, end - 1), item % HEADS, t);
    int count = 1;
    for (; first + count < end && slots[first + count] == slot; count++) longest = max(longest, visible[first + count]);
    count = __shfl_sync(ALL_LANES, count, 0);  // so that it is known to be that of all lanes
    const u32 most = static_cast<u32>(min(longest, static_cast<i64>(width)));
    if (slot != guess) {
      source.of(keys, slot);
#pragma unroll
      for (int i = 0; i <= COUNT; i++) page[i] = source.look_up(begin + own + i * stride);
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const u32 n = begin + own + i * stride;
      source.bring(ring + i * STAGE, page[i], n, n < most);
      copies_commit();
    }
    if (first > start) __syncthreads();  // nobody reads what belongs to the tokens before
    if (threadIdx.x < count) beside[threadIdx.x].seen = static_cast<u32>(min(limit, static_cast<i64>(width)));
    for (; item < count * HEADS;) {
      one.lay(memory + item / HEADS * QUERIES, beside[item / HEADS], item % HEADS, t);
      item += blockDim.x / 4;
      if (item < count * HEADS) one.fetch(q, first + item / HEADS, item % HEADS, t);
    }
    fence_shared();
    __syncthreads();
    u32 ahead = page[COUNT], next = opaque(begin + own + COUNT * stride), n = opaque(begin + own + t);
    int turn = 0;
    float* to = logits + static_cast<i64>(first) * width + n;
    for (u32 base = begin; base < width; base += stride) {
      copies_wait<COUNT - 1>();
      const Address stage = ring_at + turn;
      u32 a[STEPS][4], by[4];
      float factor, low[MOST_NEAR][2];
      if (base < most) {
        const uint4 words = load_shared16(stage + Ring<L>::SCALES);
        L::multipliers(by, factor, {words.x, words.y, words.z, words.w}, load_shared4(stage + Ring<L>::SCALES + 4 * t), t);
        load<L>(a, stage, by[0], by[1]);
      }
#pragma unroll  // so that the place of a token's queries is a constant
      for (int i = 0; i < MOST_NEAR; i++) {
        if (i >= count) break;
        low[i][0] = low[i][1] = 0;
        if (base < load_shared4(seen_at + i * TOKEN))
          multiply(low[i], a, operand_beyond(queries, i * QUERIES), weights_at + i * TOKEN);
      }
      if (base < most) load<L>(a, stage + 2 * L::PIECES * Ring<L>::PART, by[2], by[3]);
      source.bring(ring + turn, ahead, next, next < most);
      copies_commit();
      next += stride;
      ahead = source.look_up(next);
      float* row = to;
#pragma unroll
      for (int i = 0; i < MOST_NEAR; i++) {
        if (i >= count) break;
        const u32 seen = load_shared4(seen_at + i * TOKEN);
        float found = __uint_as_float(SIGN | INFINITY_BITS);
        if (base < seen) {
          float high[2] = {};
          multiply(high, a, operand_beyond(queries, i * QUERIES), weights_at + i * TOKEN);
          const float sum = gathered(low[i], high, t) * factor;
          if (n < seen) found = sum;
        }
        if (n < width) *row = found;
        row += width;
      }
      to += stride, n += stride;
      turn = turn == (COUNT - 1) * STAGE ? 0 : turn + STAGE;
    }
    copies_done();
    first += count;
  }
}

}  // namespace index_logits

#define INDEX_LOGITS(NAME, L)                                                                                         \
  extern "C" __global__ void __launch_bounds__(index_logits::GROUP* index_logits::MOST_GROUPS, 1) NAME(               \
      const u8* q, const u8* q_scales, const float* weights, int heads, const u8* pages, int page_bytes, int shift,   \
      const i64* table, i64 per_row, int rows, const i64* slots, const i64* visible, int tokens, int width, int near, \
      int groups, int spans, float* logits) {                                                                         \
    index_logits::run<index_logits::L>({q, q_scales, weights, heads},                                                 \
                                       {pages, static_cast<u32>(page_bytes), shift, table, per_row}, rows, slots,     \
                                       visible, tokens, width, near, groups, spans, logits);                          \
  }

INDEX_LOGITS(index_logits_hopper_fp4, Fp4)
INDEX_LOGITS(index_logits_hopper_fp8, Fp8)
