// The body of attend.cu's kernel.
#pragma once
#include "common/attend_tile.cuh"
#include "common/formats.cuh"
#include "common/heads.cuh"
#include "common/peers.cuh"

namespace attend {

// Where the values go: as BF16, or (no y) as FP8 rows of all heads.
struct Out {
  bf16* y;
  u8 *data, *scale;
};

// heads: of a token. wide: of a tile. slots: strands that a stream keeps; a pair that has all strands keeps one, and a second
// that it folds the next one behind where strands have several chunks.
struct Sizes {
  int heads, tiles, wide, slots;
  Rings rings;
};

// Which tile this block works on, and which columns of it. A cluster has a tile of one token's heads: pairs of blocks that have
// half the columns each, and two streams of strands a pair.
struct Place {
  i64 token;
  int pair, pairs, side, first;  // first: head

  __device__ Place(int block, const Sizes& sizes) {
    const int rank = cluster_rank(), blocks = cluster_size(), task = block / blocks;
    pair = rank / 2, pairs = blocks / 2, side = rank % 2;
    first = task % sizes.tiles * sizes.wide, token = task / sizes.tiles;
  }
  __device__ int streams() const { return GROUPS * pairs; }
  __device__ int stream(int group) const { return GROUPS * pair + group; }
};

// Halves of rows are brought, and become BF16 in shared memory, ahead of who multiplies: chunks of the two streams in turn. All
// feeders fetch, a warp widens a box of half of each chunk, and names half the rows of every fourth.
__device__ __forceinline__ void feed(const Lists& lists, Memory& memory, const Sizes& sizes) {
  static_assert(2 * BOXES == FEEDERS / 32 && NAMED == FEEDERS / 64 && NAMED > MOST_RING && NAMED % GROUPS == 0);
  const Place here(blockIdx.x, sizes);
  const int warp = threadIdx.x % FEEDERS / 32, team = warp / 2, half = warp % 2;
  const int chunks = lists.chunks(), total = GROUPS * chunks_of_stream(here.stream(0), here.streams(), chunks);
  Halves next{{here.stream(team % GROUPS), chunks, here.streams()}, half};
  next.at.next(team / GROUPS);
  pdl_wait();
  u32 row = next.row(lists, here.token);
  const auto name = [&](int n) {
    next.name(lists, row, memory.names[n % NAMED], memory.listed[n % LISTED]);
    next.at.next(NAMED / GROUPS);
    row = next.row(lists, here.token);
  };
  const auto bring = [&](int n, int slot) {
    fetch(memory.names[n % NAMED], *reinterpret_cast<const u64*>(memory.listed[n % LISTED]), here.side,
          memory.stored(sizes.rings)[slot], memory.scales[slot], memory.brought[slot].barrier);
  };
  name(team);
  meet<FEEDERS>(OF_FEEDERS);
#pragma unroll 1
  for (int n = 0; n < min(sizes.rings.ring, total); n++) bring(n, n);
  meet<FEEDERS>(OF_FEEDERS);  // whose names are read may be named anew
  await_cluster();
  int slot = 0, stage = 0;
  u32 slot_parity = 0, stage_parity = 1;  // a stage is empty at once the first time
#pragma unroll 1
  for (int n = 0; n < total; n++) {
    if (n) {
      const int before = slot ? slot - 1 : sizes.rings.ring - 1;
      memory.widened[before].barrier.wait(slot ? slot_parity : slot_parity ^ 1);  // and all names are there
      if (n + sizes.rings.ring - 1 < total) bring(n + sizes.rings.ring - 1, before);
    }
    if (n % NAMED == team) name(n + NAMED);
    memory.brought[slot].barrier.wait(slot_parity);
    memory.empty[stage].barrier.wait(stage_parity);
    const u32* const listed = memory.listed[n % LISTED];
    if (listed[0] | listed[1]) {
      u8* const kv = memory.kv(stage) + half * HALF * BOX_BYTES;
      const auto rows = memory.stored(sizes.rings)[slot].rows + half * HALF;
      if (here.side && team == BOXES - 1) {
        widen_last(rows, kv);
      } else {
        widen_box(rows, memory.scales[slot] + half * HALF, kv, team, here.side);
      }
    }
    memory.widened[slot].barrier.arrive();
    fence_shared();
    memory.full[stage].barrier.arrive();
    if (++slot == sizes.rings.ring) slot = 0, slot_parity ^= 1;
    if (++stage == sizes.rings.stages) stage = 0, stage_parity ^= 1;
  }
}

// The same where rows are BF16 already (decoded once for all who attend to them): they go straight to where they are
// multiplied, two chunks ahead.
__device__ __forceinline__ void feed_wide(const Lists& lists, Memory& memory, const Sizes& sizes) {
  constexpr int AHEAD = 2;
  const Place here(blockIdx.x, sizes);
  const int warp = threadIdx.x % FEEDERS / 32, chunks = lists.chunks();
  const int total = GROUPS * chunks_of_stream(here.stream(0), here.streams(), chunks);
  Walk at[GROUPS] = {{here.stream(0), chunks, here.streams()}, {here.stream(1), chunks, here.streams()}};
  WideRows next;
  const auto look = [&](int group) {
    next.look(lists, here.token, at[group].over() ? -1 : at[group].chunk);
    at[group].next(1);
  };
  pdl_wait();
  look(0);
  await_cluster();
  int stage = 0, landed = 0;
  u32 parity = 1;  // a stage is empty at once the first time
#pragma unroll 1
  for (int n = 0; n < total + AHEAD; n++) {
    if (n < total) {
      const WideRows now = next;
      if (n + 1 < total) n % GROUPS ? look(0) : look(1);
      memory.empty[stage].barrier.wait(parity);
      if (threadIdx.x % 32 == 0) reinterpret_cast<u8*>(memory.listed[n % LISTED])[warp] = static_cast<u8>(now.listed);
      now.bring(memory.kv(stage), here.side);
      if (++stage == sizes.rings.stages) stage = 0, parity ^= 1;
    }
    copies_commit();
    if (n < AHEAD) continue;
    copies_wait<AHEAD>();
    fence_shared();
    memory.full[landed].barrier.arrive();
    if (++landed == sizes.rings.stages) landed = 0;
  }
}

// The tile's queries as an operand: four boxes of 64 heads.
__device__ __forceinline__ void lay_queries(const bf16* q, int heads, int wide, u8* to) {
  constexpr int PIECES = COLUMNS / EIGHT, ROWS = WORKERS / PIECES, BATCH = 2;  // rows at a time
  static_assert(16 % (ROWS * BATCH) == 0);
  const int piece = threadIdx.x % PIECES;
  u8* const own = to + piece / 8 * BOX;
  for (int first = threadIdx.x / PIECES; first < wide; first += ROWS * BATCH) {
    uint4 words[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const int row = first + i * ROWS;
      words[i] = make_uint4(0, 0, 0, 0);
      if (row < heads) words[i] = load16_once(q + row * DIMS + piece * EIGHT);
    }
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const int row = first + i * ROWS;
      *reinterpret_cast<uint4*>(own + row * BOX_BYTES + 16 * (piece % 8 ^ (row & 7))) = words[i];
    }
  }
}

__device__ __forceinline__ void work(const bf16* q, int chunks, Memory& memory, const Sizes& sizes) {
  const Place here(blockIdx.x, sizes);
  const int streams = here.streams(), group = Tile::group(), wide = sizes.wide;
  const int rounds = chunks_of_stream(here.stream(0), streams, chunks);
  pdl_wait();
  lay_queries(q + (here.token * sizes.heads + here.first) * DIMS + here.side * COLUMNS, sizes.heads - here.first, wide,
              memory.queries);
  fence_shared();
  meet<WORKERS>(OF_WORKERS);
  await_cluster();
  Tile tile;
  // Alone a pair has all strands. Of one chunk each, its streams fold them as they come; else each behind those before it,
  // which wait in shared memory.
  const bool folds = here.pairs == 1 && sizes.slots > 1;
  const int count = folds ? STRANDS / GROUPS : sizes.slots;
  int i = 0, turn = 0, stage = group;
  u32 parity = 0;
  const auto join = [&](int end) {
#pragma unroll 1
    for (; i < end; i++) {
      memory.full[stage].barrier.wait(parity);
      const u64 listed = *reinterpret_cast<const u64*>(memory.listed[(GROUPS * i + group) % LISTED]);
      if (__any_sync(ALL_LANES, listed != 0)) {  // all know it, and the compiler that they do
        float s[32], kept[2], by[2];
        u32 weights[4][4];
        Tile::score(s, memory.queries, memory.kv(stage));
        Tile::exchange(s, memory, turn++, sizes.rings, wide);
        tile.weigh(s, listed, weights, kept, by);
        tile.add(weights, kept, by, memory.kv(stage));
      }
      memory.empty[stage].barrier.arrive();
      stage += GROUPS;
      if (stage >= sizes.rings.stages) stage -= sizes.rings.stages, parity ^= 1;
    }
  };
#pragma unroll 1
  for (int strand = 0; strand < count; strand++) {
    const bool last = strand + 1 == count;
    tile.clear();
    // Behind the last strand come absent chunks, where the pair's other stream has more.
    const int first = here.stream(static_cast<int>(opaque(threadIdx.x) / GROUP));  // no register keeps it
    join(last ? rounds : i + chunks_of(first + strand * streams, chunks));
    const int slot = folds ? 0 : strand;
    float* const held = memory.of(slot, sizes.slots, group, sizes.rings, wide);
    if (folds && strand) tile.fold_behind(held, memory.state[0][group], wide);
    if (!last) tile.lay(held, memory.state[slot][group], wide);
  }
  Tile::await_reading(memory, turn, wide);
  // The place of the last strands is that of the rows, of both streams. (Who meets them knows what they have waited for:
  // racecheck does not.)
  const int end = GROUPS * rounds - 1;
  memory.full[end % sizes.rings.stages].barrier.wait(end / sizes.rings.stages % 2);
  meet<WORKERS>(OF_WORKERS);
  const int slot = sizes.slots - 1;
  tile.lay(memory.of(slot, sizes.slots, group, sizes.rings, wide), memory.state[folds ? 0 : slot][group], wide);
}

// What strands came to, of eight columns of a head.
struct Part {
  float top, sum, v[8];

  __device__ void clear() {
    top = nothing(), sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = 0;
  }
  // kept, by: what this and the other are worth.
  __device__ void fold(float other_sum, const float4& low, const float4& high, float kept, float by) {
    sum = fmaf(other_sum, by, sum * kept);
    const float more[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = fmaf(more[i], by, v[i] * kept);
  }
};

// The strands of a head that have even numbers in their order, and the odd ones.
__device__ __forceinline__ void fold_strands(Part (&parts)[2], Memory& memory, int one, const Place& here, int count,
                                             const Sizes& sizes) {
  constexpr int BATCH = 4;
  const int lane = threadIdx.x % 32, streams = here.streams();
  const int strand = lane % 16 * 2 + lane / 16;
  float2 own = make_float2(nothing(), 0);
  if (strand < count)
    own = load_from(&memory.state[strand / streams][strand % GROUPS][one], strand % streams / GROUPS * 2 + here.side);
  float top = own.x;
#pragma unroll
  for (int by = 1; by < 16; by *= 2) {
    const float other = __shfl_up_sync(ALL_LANES, top, by, 16);
    if (lane % 16 >= by) top = fmaxf(top, other);
  }
  const float before = __shfl_up_sync(ALL_LANES, top, 1, 16);
  const float kept = decay(lane % 16 ? before : nothing(), top), by = decay(own.x, top);
#pragma unroll
  for (int odd = 0; odd < 2; odd++) {
    Part& part = parts[odd];
    part.clear();
#pragma unroll 1
    for (int start = odd; start < count; start += 2 * BATCH) {
      float4 more[BATCH][2];
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        const int s = start + 2 * i;
        if (s >= count) break;
        const float* const from =
            memory.of(s / streams, sizes.slots, odd, sizes.rings, sizes.wide) + one * PITCH + lane * EIGHT;
        const int rank = s % streams / GROUPS * 2 + here.side;
        more[i][0] = load_from(from, rank), more[i][1] = load_from(from + 4, rank);
      }
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        const int s = start + 2 * i, holder = odd * 16 + s / 2;
        if (s >= count) break;
        part.fold(__shfl_sync(ALL_LANES, own.y, holder), more[i][0], more[i][1], __shfl_sync(ALL_LANES, kept, holder),
                  __shfl_sync(ALL_LANES, by, holder));
      }
    }
    part.top = __shfl_sync(ALL_LANES, top, odd * 16 + 15);
  }
}

// The block's columns of a head: the odd strands behind the even ones, the sink, the way back. one: head of the tile.
template <bool ALONE>
__device__ __forceinline__ void finish(Memory& memory, int one, const Place& here, int count, const Sizes& sizes, float sink,
                                       const Turn& turn, const Angles& angles, const Out& out) {
  const int lane = threadIdx.x % 32, column = here.side * COLUMNS + lane * EIGHT, head = here.first + one;
  Part parts[2];
  if constexpr (ALONE) {
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
      const float2 state = memory.state[0][odd][one];
      const float* const from = memory.of(0, 1, odd, sizes.rings, sizes.wide) + one * PITCH + lane * EIGHT;
      parts[odd].clear(), parts[odd].top = state.x;
      const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
      parts[odd].fold(state.y, low, high, 0.0f, 1.0f);
    }
  } else {
    fold_strands(parts, memory, one, here, count, sizes);
  }
  Part& all = parts[0];
  const float(&v)[8] = parts[1].v;
  const float most = fmaxf(all.top, parts[1].top);
  all.fold(parts[1].sum, make_float4(v[0], v[1], v[2], v[3]), make_float4(v[4], v[5], v[6], v[7]), decay(all.top, most),
           decay(parts[1].top, most));
  const float sum = all.sum + (most == nothing() ? 1.0f : exp2f(sink * LOG2E - most)), inverse = 1.0f / sum;
#pragma unroll
  for (int i = 0; i < 8; i++) all.v[i] *= inverse;
  rounded8<bf16>(all.v);
  if (column >= STRAIGHT) turn.eight<bf16>(all.v, angles);
  const i64 at = here.token * sizes.heads + head;
  if (out.y) {
    store8(out.y + at * DIMS + column, all.v, EIGHT, true);
  } else {
    Fp8Row::store(all.v, 1.0f, {out.data, out.scale, sizes.heads * DIMS}, here.token, head * DIMS + column);
  }
}

// A warp's share of the tile, when all strands are laid down.
__device__ __forceinline__ void finish_share(Memory& memory, int chunks, const float* sinks, const Turn& turn,
                                             const Sizes& sizes, const Out& out) {
  const Place here(opaque(blockIdx.x), sizes);
  const int count = min(chunks, STRANDS), all = min(sizes.wide, sizes.heads - here.first);
  const int lane = threadIdx.x % 32, column = here.side * COLUMNS + lane * EIGHT;
  const int first = threadIdx.x / 32 * here.pairs + here.pair, step = WORKERS / 32 * here.pairs;
  // What does not depend on the head, or is of all of them at once.
  Angles angles;
  if (column >= STRAIGHT) angles = turn.angles(here.token, column - STRAIGHT);
  const float sink = first + lane * step < all ? sinks[here.first + first + lane * step] : 0.0f;
  if (here.pairs > 1) {
    meet_cluster();
#pragma unroll 1
    for (int one = first, i = 0; one < all; one += step, i++)
      finish<false>(memory, one, here, count, sizes, __shfl_sync(ALL_LANES, sink, i), turn, angles, out);
  } else {
    meet<WORKERS>(OF_WORKERS);
#pragma unroll 2
    for (int one = first, i = 0; one < all; one += step, i++)
      finish<true>(memory, one, here, count, sizes, __shfl_sync(ALL_LANES, sink, i), turn, angles, out);
  }
}

template <bool WIDE>
__device__ __forceinline__ void run(const bf16* q, const Lists& lists, const float* sink, const Turn& turn,
                                    const Sizes& sizes, const Out& out) {
  DYNAMIC_SHARED(__align__(1024) u8, shared);
  Memory& memory = *reinterpret_cast<Memory*>(shared);
  pdl_trigger();
  if (threadIdx.x == 0) {
    for (int i = 0; i < MOST_RING; i++) memory.brought[i].barrier.init(FEEDERS), memory.widened[i].barrier.init(FEEDERS);
    for (int i = 0; i < MOST_STAGES; i++) memory.full[i].barrier.init(FEEDERS), memory.empty[i].barrier.init(GROUP);
    for (int i = 0; i < GROUPS; i++) {
      Barrier &sent = memory.sent[i].barrier, &read = memory.read[i].barrier;
      sent.init(1), sent.arrive_expecting(256 * sizes.wide);
      read.init(1), read.arrive_expecting(sizes.wide / 4);
    }
    fence_barriers();
  }
  __syncthreads();
  begin_cluster();
  if (threadIdx.x >= WORKERS) {
    Share::give();
    if constexpr (WIDE) {
      feed_wide(lists, memory, sizes);
    } else {
      feed(lists, memory, sizes);
    }
    if (cluster_size() > 2) meet_cluster();
  } else {
    Share::take();
    work(q, lists.chunks(), memory, sizes);
    finish_share(memory, lists.chunks(), sink, turn, sizes, out);
  }
  if (cluster_size() > 2) leave_cluster();  // others read here until now
}

}  // namespace attend
