// Which of a block's or a team's keys are the k largest, and where each goes in the order of its index. Equal keys: the lowest
// indices. A number of threads has as many bins; `keys.each` gives every key and its index to a function.
#pragma once
#include "common/reduce.cuh"
#include "common/team.cuh"

constexpr int BINS = 1024;  // and threads, at most

// What is left to look at: from lo to hi, of which the `need` largest are picked, as all above them.
struct Range {
  u32 lo, hi, need, count;
};

template <int KEYS>
struct Scratch {
  alignas(16) u32 bits[KEYS / 32];  // which of a block's keys are picked
  u32 bins[BINS];
  u32 sums[32], ends[2][32];  // of warps
  u32 before;                 // picked ones in front of the block's keys
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
#ifdef __CUDA_ARCH__
  asm volatile("redux.sync.add.u32 %0, %0, 0xFFFFFFFF;" : "+r"(v));
#else
  for (int other = 16; other; other >>= 1) v += __shfl_xor_sync(ALL_LANES, v, other);
#endif
  return v;
}

// The least and the largest of all threads' numbers, as a range.
template <class Team, class Scratch>
__device__ __forceinline__ Range extent(u32 low, u32 high, int k, const Team& team, Scratch& s) {
  const int lane = team.thread % 32, warp = team.thread / 32, warps = team.threads / 32;
  low = group_max<32>(~low), high = group_max<32>(high);
  if (lane == 0) s.ends[0][warp] = low, s.ends[1][warp] = high;
  team.sync();
  low = ~group_max<32>(lane < warps ? s.ends[0][lane] : 0), high = group_max<32>(lane < warps ? s.ends[1][lane] : 0);
  return {max(low, 1u), high, static_cast<u32>(k), 0};
}

// The bin that holds the last of `need` numbers, counted from the top; all from 1 up where there are fewer. Its count is
// that of the numbers in it. `each` gives all numbers to a function; SHARED: each block gives its own.
template <bool SHARED, class Team, class Scratch, class Each>
__device__ __forceinline__ Range narrowed(const Range& range, const Team& team, Scratch& s, const Each& each) {
  const int bin = team.threads - 1 - team.thread, lane = team.thread % 32, warp = team.thread / 32;
  const int shift = max(1 + __clz(team.threads) - __clz(static_cast<int>(range.hi - range.lo)), 0);
  each([&](u32 value) {
    const u32 above = value - range.lo;
    if (above <= range.hi - range.lo) atomicAdd(&s.bins[above >> shift], 1u);
  });
  team.sync();
  u32 count = s.bins[bin];
  s.bins[bin] = 0;
  if constexpr (SHARED) {
    u32* const all = reinterpret_cast<u32*>(s.list) + bin;
    for (int block = 0; block < team.size; block++) team.put(all + team.rank * team.threads, count, block);
    team.meet();
    count = 0;
    for (int block = 0; block < team.size; block++) count += all[block * team.threads];
  }
  u32 upto = scanned(count);
  if (lane == 31) s.sums[warp] = upto;
  team.sync();
  upto += warp_total(lane < warp ? s.sums[lane] : 0);
  if (upto >= range.need && upto - count < range.need) {
    const u32 lo = range.lo + (static_cast<u32>(bin) << shift);
    s.range = {lo, lo + min(range.hi - lo, (1u << shift) - 1), range.need - (upto - count), count};
  } else if (bin == 0 && upto < range.need) {
    s.range = {1, range.hi, range.need, 0};
  }
  if constexpr (SHARED) {
    team.meet();  // the bins may be written again
  } else {
    team.sync();
  }
  return s.range;
}

template <bool SHARED, class Team, class Scratch, class Each>
__device__ __forceinline__ Range passes(Range range, const Team& team, Scratch& s, const Each& each) {
#pragma unroll 1
  while (range.lo < range.hi && range.count != range.need) range = narrowed<SHARED>(range, team, s, each);
  return range;
}

// Which keys are picked: from `sure` up, and of those that equal `last` the ones of indices up to ~least.
struct Picked {
  u32 sure, last, least;

  __device__ bool operator()(u32 key, int at) const {
    return key >= sure || (key == last && ~static_cast<u32>(at) >= least);
  }
};

template <bool SHARED, class Keys, class Team, class Scratch>
__device__ __forceinline__ Picked picked(const Keys& keys, Range range, int n, const Team& team, Scratch& s) {
  range = passes<SHARED>(range, team, s, [&](const auto& f) { keys.each([&](u32 key, int) { f(key); }); });
  if (range.count == range.need) return {range.lo, 0, 0};
  const u32 last = range.hi;
  range = passes<SHARED>({~static_cast<u32>(n - 1), ~0u, range.need, 0}, team, s, [&](const auto& f) {
    keys.each([&](u32 key, int at) { f(key == last ? ~static_cast<u32>(at) : 0); });
  });
  return {last + 1, last, range.lo};
}

// Writes the picked ones of the block's keys, those with indices from first to end. `bits` and `before` are zeros.
template <bool SHARED, class Keys, class Team, class Scratch>
__device__ __forceinline__ void places(const Keys& keys, const Picked& picked, int first, int end, const Team& team,
                                       Scratch& s, i64* out) {
  const int lane = team.thread % 32, warp = team.thread / 32, warps = team.threads / 32;
  keys.each([&](u32 key, int at) {
    if (picked(key, at)) {
      if (at < first) {
        atomicAdd(&s.before, 1u);
      } else if (at < end) {
        atomicAdd(&s.bits[(at - first) / 32], 1u << (at - first) % 32);
      }
    }
  });
  team.sync();
  const int words = max(end - first + 31, 0) / 32, each = (words + team.threads - 1) / team.threads;
  const int from = team.thread * each, to = min(from + each, words);
  u32 count = 0;
  for (int i = from; i < to; i++) count += __popc(s.bits[i]);
  const u32 upto = scanned(count);
  if (lane == 31) s.sums[warp] = upto;
  team.sync();
  u32 place = s.before + upto - count + warp_total(lane < warp ? s.sums[lane] : 0);
  if constexpr (SHARED) {
    const u32 total = warp_total(lane < warps ? s.sums[lane] : 0);
    if (team.thread < team.size) team.put(&s.counts[team.rank], total, team.thread);
    team.meet();
    for (int block = 0; block < team.rank; block++) place += s.counts[block];
  }
  for (int i = from; i < to; i++) {
    for (u32 word = s.bits[i]; word; word &= word - 1) out[place++] = first + i * 32 + __ffs(static_cast<int>(word)) - 1;
  }
}
