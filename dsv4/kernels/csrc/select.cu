// The k best of a token's scores, ascending by index, the lowest index among equals: select_rows.
//
// Moves   the visible scores once, 1 MiB of 262,144: with few tokens out of the second cache, as the indexer has just
//         written them.
// Form    Up to 16,384 keys: one block, each key in a register. More: a team of 2 to 16 blocks, as many as there are
//         multiprocessors for. Its warps take 128 neighbours in turn, so that all blocks see each part of the context.
//
//         1  Bound, of a team. Of up to 2,048 groups of keys, the k-th of their largest, rounded down to a bin: no larger
//            than the k-th key, and so close to it that few more than k random keys remain. Found once a thread has seen
//            16 keys, whenever it has seen twice as many since, and at the end. Each takes a meeting of the team.
//         2  List, of a team. Keys from the bound up go to all blocks, with their indices, and the team meets for the last
//            time. A key below costs two or three instructions, since four neighbours are looked at as one, as floats:
//            many tokens wait for memory alone.
//         3  Passes. From the bound to the largest key, as many bins of equal width as a block has threads; the bin of the
//            k-th becomes the range. Ends where all keys of the range are picked, after two or three passes of random
//            keys. Where equal keys are left over, the same over their indices.
//         4  Places. A bit for each key says whether it is picked, and the bits before it where it goes.
//
//         A list without room for a block's keys (rising scores, more equal ones than fit) is forgotten: each pass reads the
//         scores again, and the team adds up its bins.
//
// A launch of other shape finds the same: counts are integers, and no order within a list matters.
//
// Measured on an H100 (bench/results/2026-11-27-ops-second.jsonl), 512 of 262,144: one token 9.6 us, 64 tokens 37.8 (the bytes
//         take 23.5); of 65,536 9.2, of 8,192 5.6. 1,024 of them take about a microsecond more.
// Tried   all keys in registers, a meeting a pass and one before the places, 16 blocks a token however many there are: a
//         hundred instructions a key. 14.6 us and 148, of 8,192 6.7.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/best.cuh"
#include "common/picks.cuh"

constexpr int MOST_THREADS = BINS, MOST_BLOCKS = 16, CHUNK = 128;
constexpr int BATCH = 4;                     // rounds that a thread of a team loads at once
constexpr int PART = 32 * 4 * MOST_THREADS;  // keys of a block of a team, at most
constexpr int GROUPS = 2048, LISTED = 8192, TEAM_BYTES = 86'800;

struct TeamScratch : Scratch<PART> {  // `bits` are first the groups' largest keys, twice: those of the next bound come early
  u32 found, counts[MOST_BLOCKS];     // listed keys
  alignas(16) u64 list[LISTED];       // of each block a part: key and index. Then bins of each block
};
static_assert(sizeof(TeamScratch) <= TEAM_BYTES && 2 * GROUPS <= PART / 32);
static_assert(MOST_BLOCKS * BINS * sizeof(u32) <= LISTED * sizeof(u64));

// The larger one, or the one that is a number.
__device__ __forceinline__ float larger(float a, float b) {
#ifdef __CUDA_ARCH__
  return fmaxf(a, b);
#else  // whose fmaxf lets some NaNs through
  return b != b || a > b ? a : b;
#endif
}

// Where a thread's scores are, of a row of which n are visible.
struct Row {
  const float* scores;
  int first, step;  // of the first round, and between rounds
  bool fours;       // can be loaded at once

  __device__ int at(int round) const { return first + round * step; }

  // What is not among the first `limit` is read elsewhere: no branch stands between the loads.
  __device__ void fetch(int round, int limit, float (&v)[4]) const {
    const int from = at(round);
    if (fours) {
      const uint4 four = load16_once(scores + (from < limit ? from : 0));
      v[0] = __uint_as_float(four.x), v[1] = __uint_as_float(four.y);
      v[2] = __uint_as_float(four.z), v[3] = __uint_as_float(four.w);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = load4_once(scores + (from + i < limit ? from + i : 0));
    }
  }
  template <int ROUNDS>
  __device__ void fetch(int round, int limit, float (&v)[ROUNDS][4]) const {
#pragma unroll
    for (int j = 0; j < ROUNDS; j++) fetch(round + j, limit, v[j]);
  }

  // From far away to the second cache, a line by one of the eight lanes that share it.
  template <int ROUNDS>
  __device__ void expect(int round, int limit) const {
#pragma unroll
    for (int j = 0; j < ROUNDS; j++)
      if (threadIdx.x % 8 == 0 && at(round + j) < limit) prefetch_line(scores + at(round + j));
  }
};

__device__ __forceinline__ int seen(const i64* visible, i64 token, int width) {
  return static_cast<int>(max(min(load8_once(visible + token), static_cast<i64>(width)), 0ll));
}

// Keys that stay in registers. Key 0 is nobody's.
template <int ROUNDS>
struct Held {
  const Row row;
  u32 key[ROUNDS][4];

  __device__ Held(const Row& row, int n, const float (&v)[ROUNDS][4]) : row(row) {
#pragma unroll
    for (int j = 0; j < ROUNDS; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) key[j][i] = row.at(j) + i < n ? order_key(v[j][i]) : 0;
    }
  }
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int j = 0; j < ROUNDS; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) f(key[j][i], row.at(j) + i);
    }
  }
};

// Keys that are read again whenever they are looked at, up to index `end`.
struct Streamed {
  const Row row;
  int end;

  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll 1
    for (int j = 0; row.at(j) < end; j++) {
      float v[4];
      row.fetch(j, end, v);
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (row.at(j) + i < end) f(order_key(v[i]), row.at(j) + i);
    }
  }
};

// Keys of a team's list, of which each block has `room` places. Warps take 32 in turn, of one block after another.
struct Listed {
  const u64* list;
  const u32* counts;
  int room, most, blocks, warp, warps;  // most: keys of a block

  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    const int log = 31 - __clz(blocks);
#pragma unroll 1
    for (int i = warp; (i >> log) * 32 < most; i += warps) {
      const int block = i & (blocks - 1), at = (i >> log) * 32 + threadIdx.x % 32;
      if (at >= static_cast<int>(counts[block])) continue;
      const u64 entry = list[block * room + at];
      f(static_cast<u32>(entry >> 32), static_cast<int>(entry & 0xFFFFFFFF));
    }
  }
};

// All n of a row.
template <class Team>
__device__ __forceinline__ void all(int n, int columns, const Team& team, i64* out) {
  for (int i = team.rank * team.threads + team.thread; i < columns; i += team.size * team.threads) out[i] = i < n ? i : -1;
}

// out: [tokens, columns]; columns is k or less. ahead: read before it is known how many are visible.
struct Given {
  const float* scores;
  i64 stride;
  const i64* visible;
  int width, columns, blocks, room, ahead;
  i64* out;

  template <class Team>
  __device__ __forceinline__ Row row(const Team& team, int first, int step) const {
    return {scores + team.token * stride, first, step, aligned(scores, stride * 4, 16) && width % 4 == 0};
  }
};

// A token's first scores on their way, and how many of them it sees.
template <int ROUNDS>
__device__ __forceinline__ int started(const Given& g, i64 token, const Row& row, float (&v)[ROUNDS][4]) {
  pdl_wait();
  int limit = g.width;
  if (!g.ahead) limit = seen(g.visible, token, g.width);
  row.fetch(0, limit, v);
  return seen(g.visible, token, g.width);
}

template <int ROUNDS>
__device__ __forceinline__ void by_one(const Given& g, Scratch<ROUNDS * 4 * MOST_THREADS>* scratches) {
  const Team<1, Scratch<ROUNDS * 4 * MOST_THREADS>> team(1);
  auto& s = team.scratch(scratches);
  pdl_trigger();
  s.bins[team.thread] = 0;
  for (int i = team.thread; i < ROUNDS * 4 * team.threads / 32; i += team.threads) s.bits[i] = 0;
  if (team.thread == 0) s.before = 0;
  const Row row = g.row(team, team.thread * 4, team.threads * 4);
  i64* const out = g.out + team.token * g.columns;
  float v[ROUNDS][4];
  const int n = started(g, team.token, row, v);
  if (n <= g.columns) return all(n, g.columns, team, out);

  // As many groups of threads as are picked: the least of their largest keys is a bound.
  const Held<ROUNDS> keys(row, n, v);
  u32 own = 0;
  keys.each([&](u32 key, int) { own = max(own, key); });
  u32 group = team.threads < g.columns ? 0 : own;
  for (int other = 1; other < 32 && team.threads / (2 * other) >= g.columns; other *= 2)
    group = max(group, __shfl_xor_sync(ALL_LANES, group, other));
  const Range range = extent(group, own, g.columns, team, s);
  places<false>(keys, picked<false>(keys, range, n, team, s), 0, n, team, s, out);
}

// From the k-th of the largest keys of groups, rounded down, to the largest of all.
template <class Team>
__device__ __forceinline__ Range bound(u32 own, int k, int turn, const Team& team, TeamScratch& s) {
  int log = 0;
  while (team.size * team.threads >> log > GROUPS) {
    own = max(own, __shfl_xor_sync(ALL_LANES, own, 1 << log));
    log++;
  }
  u32* const largest = s.bits + turn * GROUPS;
  const int groups = team.size * team.threads >> log, lanes = 1 << log;
  u32* const place = largest + ((team.rank * team.threads + team.thread) >> log);
  for (int block = team.thread & (lanes - 1); block < team.size; block += lanes) team.put(place, own, block);
  team.meet();
  const auto each = [&](const auto& f) {
    for (int i = team.thread; i < groups; i += team.threads) f(largest[i]);
  };
  u32 low = ~0u, high = 0;
  each([&](u32 key) { low = min(low, key ? key : ~0u), high = max(high, key); });  // a group may have none
  const Range range = extent(low, high, k, team, s);
  return {narrowed<false>(range, team, s, each).lo, range.hi, range.need, 0};
}

// Lists a thread's keys from `lo` up. `top`: the largest of each round.
template <class Team>
__device__ __forceinline__ void listed(const float (&v)[BATCH][4], const u32 (&top)[BATCH], u32 lo, int n, const Row& row,
                                       int round, int room, const Team& team, TeamScratch& s) {
#pragma unroll
  for (int j = 0; j < BATCH; j++) {
    if (top[j] < lo) continue;
    const int at = row.at(round + j);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 key = order_key(v[j][i]);
      if (key < lo || at + i >= n) continue;
      const u32 place = atomicAdd(&s.found, 1u);
      if (place < static_cast<u32>(room)) s.list[team.rank * room + place] = static_cast<u64>(key) << 32 | (at + i);
    }
  }
}

__device__ __forceinline__ void by_team(const Given& g, TeamScratch* scratches) {
  const Team<MOST_BLOCKS, TeamScratch> team(g.blocks);
  TeamScratch& s = team.scratch(scratches);
  const int lane = team.thread % 32, warp = team.thread / 32;
  pdl_trigger();
  s.bins[team.thread] = 0;
  if (team.thread == 0) s.found = s.before = 0;
  const Row row = g.row(team, (warp * team.size + team.rank) * CHUNK + lane * 4, team.threads * 4 * team.size);
  i64* const out = g.out + team.token * g.columns;
  float v[BATCH][4];
  const int n = started(g, team.token, row, v);
  if (n <= g.columns) return all(n, g.columns, team, out);
  team.begin();

  Range range;
  u32 own = 0;
  int turn = 0, next = BATCH;  // round up to which keys are seen at the next bound
#pragma unroll 1
  for (int round = 0; round * row.step < n; round += BATCH) {
    row.expect<BATCH>(round + BATCH, n);  // the memory is at work while all else is done
    u32 top[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      const int at = row.at(round + j);
      if (at + 4 > n) {
#pragma unroll
        for (int i = 1; i < 4; i++)
          if (at + i >= n) v[j][i] = v[j][0];
      }
      top[j] = at < n ? order_key(larger(larger(v[j][0], v[j][1]), larger(v[j][2], v[j][3]))) : 0;
      own = max(own, top[j]);
    }
    const int seen = round + BATCH;
    if (seen == next || seen * row.step >= n) {
      if (round == 0) team.begun();
      range = bound(own, g.columns, turn, team, s);
      turn ^= 1, next = 2 * seen;
    }
    listed(v, top, range.lo, n, row, round, g.room, team, s);
    if (seen * row.step < n) row.fetch(seen, n, v);
  }

  team.sync();
  const int found = static_cast<int>(s.found), log = 31 - __clz(team.size);
  for (int i = team.thread; found <= g.room && i < found << log; i += team.threads) {
    u64* const entry = s.list + team.rank * g.room + (i >> log);
    const int block = i & (team.size - 1);
    if (block != team.rank) team.put(entry, *entry, block);
  }
  if (team.thread < team.size) team.put(&s.counts[team.rank], static_cast<u32>(found), team.thread);
  team.meet();
  const int most = static_cast<int>(group_max<32>(lane < team.size ? s.counts[lane] : 0));
  const int part = ((n + team.size - 1 >> log) + 3) / 4 * 4, first = team.rank * part, end = min(first + part, n);
  for (int i = team.thread; i < (part + 31) / 32; i += team.threads) s.bits[i] = 0;
  team.sync();
  if (most <= g.room) {
    const Listed keys{s.list, s.counts, g.room, most, team.size, warp, team.threads / 32};
    places<false>(keys, picked<false>(keys, range, n, team, s), first, end, team, s, out);
  } else {
    const Streamed keys{g.row(team, first + team.thread * 4, team.threads * 4), end};
    places<true>(keys, picked<true>(keys, range, n, team, s), first, end, team, s, out);
  }
}

#define SELECT(name)                                                                                                      \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)                                                           \
      name(const float* scores, i64 stride, const i64* visible, int width, int columns, int blocks, int room, int ahead, \
           i64* out)
#define GIVEN {scores, stride, visible, width, columns, blocks, room, ahead, out}

#define SELECT_ALONE(ROUNDS)                               \
  SELECT(select_alone_##ROUNDS) {                          \
    __shared__ Scratch<ROUNDS * 4 * MOST_THREADS> scratch; \
    by_one<ROUNDS>(GIVEN, &scratch);                       \
  }

SELECT_ALONE(1)
SELECT_ALONE(2)
SELECT_ALONE(4)

SELECT(select_team) {
  TEAM_SHARED(TeamScratch, scratches);
  by_team(GIVEN, scratches);
}
