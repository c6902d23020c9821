// The k best of a token's scores, ascending by index, the lowest index among equals: select_rows.
//
// Moves   the visible scores once, 1 MiB of 262,144, mostly out of the second cache: the indexer has just written them.
// Form    a team of up to 16 blocks a token; every thread holds four neighbours of each of its rounds as ordered keys.
//         The team takes `threads * 4` scores of a block after another's, so that all see each part of the context.
//
//         1  Bound. As many groups of threads as are picked, or more: the least of their largest keys is no larger than
//            the k-th, and so close to it that a hundredth of random keys remain.
//         2  Passes. Between bound and largest key, 256 bins of equal width; the bin of the k-th becomes the range. Each
//            block counts its keys, and sends its bins to all, who then find the same. Ends where all keys of the range
//            are picked, or are equal: after one or two passes of random keys, four at most, none if all are equal.
//         3  Places. A key's place is how many picked ones have a lower index: counted in lanes, warps and blocks.
//
// A launch of other shape finds the same. Counts are integers, so no order matters. Equal keys meet in eight copies of a
// bin, by lane: 16,384 additions of a block to one word would take longer than all else.
//
// Versions tried: none has been measured.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/best.cuh"
#include "common/team.cuh"

constexpr int BITS = 8, BINS = 1 << BITS, COPIES = 8;
constexpr int MOST_BLOCKS = 16, MOST_ROUNDS = 32, WARPS = 32;

// What is left to look at: keys from lo to hi, of which the `need` best are picked, as all above them.
struct Range {
  u32 lo, hi, need, count;
};

template <int MOST>
struct Scratch {
  alignas(16) u32 bins[BINS * COPIES];
  u32 all[2][MOST][BINS];
  u32 ends[MOST][2];
  u32 totals[MOST_ROUNDS * MOST];  // of a round of a block: picked for sure in the low half, equal to the last above
  u32 warps[MOST_ROUNDS][WARPS];   // the same of a warp, then of the warps before it
  u32 before[MOST_ROUNDS][2];      // of the rounds and blocks before
  u32 sums[BINS / 32];
  Range range;
};

__device__ __forceinline__ u32 scanned(u32 v) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const u32 left = __shfl_up_sync(ALL_LANES, v, by);
    if (lane >= by) v += left;
  }
  return v;
}

__device__ __forceinline__ u32 warp_total(u32 v) {
#pragma unroll
  for (int other = 16; other; other >>= 1) v += __shfl_xor_sync(ALL_LANES, v, other);
  return v;
}

// Where a thread's scores are, of a row of which n are visible.
struct Row {
  const float* scores;
  int n, step, first;  // between rounds, and of the first one
  bool fours;          // can be loaded at once

  __device__ int at(int round) const { return first + round * step; }

  // What is not there is read elsewhere: no branch stands between the loads.
  __device__ void fetch(int round, float (&v)[4]) const {
    const int from = at(round);
    if (fours) {
      const uint4 four = load16_once(scores + (from < n ? from : 0));
      v[0] = __uint_as_float(four.x), v[1] = __uint_as_float(four.y);
      v[2] = __uint_as_float(four.z), v[3] = __uint_as_float(four.w);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = load4_once(scores + min(from + i, n - 1));
    }
  }

  // Key 0 is nobody's.
  __device__ void order(int round, const float (&v)[4], u32 (&key)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) key[i] = at(round) + i < n ? order_key(v[i]) : 0;
  }
};

// Keys that stay in registers.
template <int ROUNDS>
struct Held {
  u32 key[ROUNDS][4];
  static constexpr int rounds = ROUNDS;

  __device__ Held(const Row& row, int) {
    float v[ROUNDS][4];  // all on their way before one is looked at
#pragma unroll
    for (int j = 0; j < ROUNDS; j++) row.fetch(j, v[j]);
#pragma unroll
    for (int j = 0; j < ROUNDS; j++) row.order(j, v[j], key[j]);
  }
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int j = 0; j < ROUNDS; j++) f(j, key[j]);
  }
};

// Keys that are read again whenever they are looked at.
struct Streamed {
  const Row row;
  const int rounds;

  __device__ Streamed(const Row& row, int rounds) : row(row), rounds(rounds) {}
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll 1
    for (int j = 0; j < rounds; j++) {
      float v[4];
      u32 key[4];
      row.fetch(j, v);
      row.order(j, v, key);
      f(j, key);
    }
  }
};

// A range that holds the k-th key, and all keys in it or below.
template <class Keys, class Team, class Scratch>
__device__ __forceinline__ Range bounds(const Keys& keys, const Team& team, Scratch& s, int k) {
  const int lane = team.thread % 32, warp = team.thread / 32, warps = team.threads / 32;
  u32 own = 0;
  keys.each([&](int, const u32(&key)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) own = max(own, key[i]);
  });
  u32 group = own;
  int groups = 32;  // of a warp
  for (int other = 1; other < 32 && team.size * warps * groups / 2 >= k; other *= 2) {
    group = max(group, __shfl_xor_sync(ALL_LANES, group, other));
    groups /= 2;
  }
  if (team.size * warps * groups < k) group = 0;
  const u32 least = ~group_max<32>(~group), top = group_max<32>(own);
  if (lane == 0) s.warps[0][warp] = least, s.warps[1][warp] = top;
  team.sync();
  team.begun();
  if (warp == 0) {
    const u32 low = ~group_max<32>(lane < warps ? ~s.warps[0][lane] : 0);
    const u32 high = group_max<32>(lane < warps ? s.warps[1][lane] : 0);
    if (lane < team.size) team.put(&s.ends[team.rank][0], low, lane), team.put(&s.ends[team.rank][1], high, lane);
  }
  team.meet();
  const u32 low = ~group_max<32>(lane < team.size ? ~s.ends[lane][0] : 0);
  const u32 high = group_max<32>(lane < team.size ? s.ends[lane][1] : 0);
  return {max(low, 1u), high, static_cast<u32>(k), 0};
}

// The bin that holds the last of `need` keys, counted from the top. Its count is that of the keys in it.
template <class Team, class Scratch>
__device__ __forceinline__ Range narrowed(const Range& range, int shift, const Team& team, Scratch& s,
                                          const u32 (*all)[BINS]) {
  const int bin = BINS - 1 - team.thread, warp = team.thread / 32;
  u32 count = 0, upto = 0;
  if (bin >= 0) {
#pragma unroll 2
    for (int block = 0; block < team.size; block++) count += all[block][bin];
    upto = scanned(count);
    if (team.thread % 32 == 31) s.sums[warp] = upto;
  }
  team.sync();
  if (bin >= 0) {
    for (int i = 0; i < warp; i++) upto += s.sums[i];
    if (upto >= range.need && upto - count < range.need) {
      const u32 lo = range.lo + (static_cast<u32>(bin) << shift);
      s.range = {lo, lo + min(range.hi - lo, (1u << shift) - 1), range.need - (upto - count), count};
    }
  }
  team.sync();
  return s.range;
}

template <class Keys, class Team, class Scratch>
__device__ __forceinline__ Range passes(const Keys& keys, const Team& team, Scratch& s, Range range) {
  const int copy = team.thread % COPIES;
  for (int pass = 0; range.lo < range.hi && range.count != range.need; pass ^= 1) {
    const int shift = max(32 - __clz(static_cast<int>(range.hi - range.lo)) - BITS, 0);
    keys.each([&](int, const u32(&key)[4]) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u32 above = key[i] - range.lo;
        if (above <= range.hi - range.lo) atomicAdd(&s.bins[(above >> shift) * COPIES + copy], 1u);
      }
    });
    team.sync();
    for (int i = team.thread; i < BINS * team.size; i += team.threads) {
      const uint4* const copies = reinterpret_cast<const uint4*>(s.bins + i % BINS * COPIES);
      const uint4 a = copies[0], b = copies[1];
      team.put(&s.all[pass][team.rank][i % BINS], a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w, i / BINS);
    }
    team.meet();
    for (int i = team.thread; i < BINS * COPIES; i += team.threads) s.bins[i] = 0;
    range = narrowed(range, shift, team, s, s.all[pass]);
  }
  return range;
}

// Which keys are picked: from `sure` up, and of those that equal `last` the first `need`.
struct Picked {
  u32 sure, last, need;

  __device__ explicit Picked(const Range& range)
      : sure(range.count == range.need ? range.lo : range.hi + 1),
        last(range.count == range.need ? ~0u : range.hi),  // ~0 is nobody's key
        need(range.need) {}

  __device__ u32 count(const u32 (&key)[4]) const {
    u32 found = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) found += (key[i] >= sure) + ((key[i] == last) << 16);
    return found;
  }
};

template <class Keys, class Team, class Scratch>
__device__ __forceinline__ void places(const Keys& keys, const Team& team, Scratch& s, const Row& row,
                                       const Picked& picked, i64* out) {
  const int lane = team.thread % 32, warp = team.thread / 32, warps = team.threads / 32;
  keys.each([&](int round, const u32(&key)[4]) {
    const u32 total = warp_total(picked.count(key));
    if (lane == 0) s.warps[round][warp] = total;
  });
  team.sync();
  for (int round = warp; round < keys.rounds; round += warps) {
    const u32 own = lane < warps ? s.warps[round][lane] : 0, upto = scanned(own);
    s.warps[round][lane] = upto - own;
    const u32 total = __shfl_sync(ALL_LANES, upto, 31);
    if (lane < team.size) team.put(&s.totals[round * team.size + team.rank], total, lane);
  }
  team.meet();
  for (int round = warp; round < keys.rounds; round += warps) {
    u32 sure = 0, last = 0;
    for (int i = lane; i < round * team.size + team.rank; i += 32) {
      sure += s.totals[i] & 0xFFFF, last += s.totals[i] >> 16;
    }
    sure = warp_total(sure), last = warp_total(last);
    if (lane == 0) s.before[round][0] = sure, s.before[round][1] = last;
  }
  team.sync();
  const int first = opaque(row.first);  // computed again: sixteen indices have no room beside the keys
  keys.each([&](int round, const u32(&key)[4]) {
    const u32 own = picked.count(key), in_block = scanned(own) - own + s.warps[round][warp];
    u32 sure = s.before[round][0] + (in_block & 0xFFFF), last = s.before[round][1] + (in_block >> 16);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const bool equal = key[i] == picked.last;
      if (key[i] >= picked.sure || (equal && last < picked.need)) {
        out[sure + min(last, picked.need)] = first + round * row.step + i;
      }
      sure += key[i] >= picked.sure, last += equal;
    }
  });
}

// out: [tokens, columns]; columns is k or less.
template <int MOST, class Keys>
__device__ __forceinline__ void select(const float* scores, i64 stride, const i64* visible, int width, int columns,
                                       int blocks, int rounds, i64* out, Scratch<MOST>* scratches) {
  const Team<MOST, Scratch<MOST>> team(blocks);
  Scratch<MOST>& s = team.scratch(scratches);
  pdl_trigger();
  for (int i = team.thread; i < BINS * COPIES; i += team.threads) s.bins[i] = 0;
  pdl_wait();
  const i64 seen = visible[team.token];
  const int n = static_cast<int>(max(min(seen, static_cast<i64>(width)), 0ll));
  out += team.token * columns;
  if (n <= columns) {  // all of them
    for (int i = team.rank * team.threads + team.thread; i < columns; i += team.size * team.threads) out[i] = i < n ? i : -1;
    return;
  }
  team.begin();
  const int part = team.threads * 4;
  const Row row{scores + team.token * stride, n, team.size * part, team.rank * part + team.thread * 4,
                aligned(scores, stride * 4, 16) && width % 4 == 0};
  const Keys keys(row, rounds);
  const Range range = passes(keys, team, s, bounds(keys, team, s, columns));
  places(keys, team, s, row, Picked(range), out);
}

#define SELECT(name, MOST, Keys)                                                                                 \
  extern "C" __global__ void __launch_bounds__(1024, 1)                                                            \
      name(const float* scores, i64 stride, const i64* visible, int width, int columns, int blocks, int rounds,  \
           i64* out) {                                                                                           \
    __shared__ Scratch<MOST> scratches[MOST == 1 ? 1 : TEAM_SCRATCHES];                                           \
    select<MOST, Keys>(scores, stride, visible, width, columns, blocks, rounds, out, scratches);                 \
  }

SELECT(select_alone_1, 1, Held<1>)
SELECT(select_alone_2, 1, Held<2>)
SELECT(select_alone_4, 1, Held<4>)
SELECT(select_cluster_1, MOST_BLOCKS, Held<1>)
SELECT(select_cluster_2, MOST_BLOCKS, Held<2>)
SELECT(select_cluster_4, MOST_BLOCKS, Held<4>)
SELECT(select_streamed, MOST_BLOCKS, Streamed)
