// The body of attend.cu's kernels.
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

// Half a head: the strands in their order, the sink, the way back. count: strands, dealt out to `blocks`. BATCH: of strands,
// on their way together.
template <int BATCH, int HEADS>
__device__ __forceinline__ void finish(Memory<HEADS>& memory, int one, int half, int count, int blocks, float sink,
                                       const Turn& turn, i64 token, int head, int heads, const Out& out) {
  const int lane = threadIdx.x % 32, slots = (count + blocks - 1) / blocks, column = half * WARP_COLUMNS + lane * EIGHT;
  float2 own = make_float2(nothing(), 0);
  if (lane < count) own = load_from(&memory.state[lane / blocks][one], lane % blocks);
  float top = own.x;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const float other = __shfl_up_sync(ALL_LANES, top, by);
    if (lane >= by) top = fmaxf(top, other);
  }
  const float before = __shfl_up_sync(ALL_LANES, top, 1);
  const float kept = decay(lane ? before : nothing(), top), by = decay(own.x, top);
  // What is needed last is on its way first.
  Angles angles;
  if (column >= STRAIGHT) angles = turn.angles(token, column - STRAIGHT);
  float v[8] = {}, sum = 0;
  int rank = 0, slot = 0;
#pragma unroll 1
  for (int start = 0; start < count; start += BATCH) {
    float4 more[BATCH][2];
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      if (start + i >= count) break;
      const float* const from = memory.of(slot, slots) + one * PITCH + column;
      more[i][0] = load_from(from, rank), more[i][1] = load_from(from + 4, rank);
      if (++rank == blocks) rank = 0, slot++;
    }
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      if (start + i >= count) break;
      const float a = __shfl_sync(ALL_LANES, kept, start + i), b = __shfl_sync(ALL_LANES, by, start + i);
      sum = fmaf(__shfl_sync(ALL_LANES, own.y, start + i), b, sum * a);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        v[4 * h] = fmaf(more[i][h].x, b, v[4 * h] * a), v[4 * h + 1] = fmaf(more[i][h].y, b, v[4 * h + 1] * a);
        v[4 * h + 2] = fmaf(more[i][h].z, b, v[4 * h + 2] * a), v[4 * h + 3] = fmaf(more[i][h].w, b, v[4 * h + 3] * a);
      }
    }
  }
  const float most = __shfl_sync(ALL_LANES, top, 31);
  sum += most == nothing() ? 1.0f : expf(sink - most);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = v[i] / sum;
  rounded8<bf16>(v);
  if (column >= STRAIGHT) turn.eight<bf16>(v, angles);
  if (out.y) {
    store8(out.y + (token * heads + head) * DIMS + column, v, EIGHT, true);
  } else {
    Fp8Row::store(v, 1.0f, {out.data, out.scale, heads * DIMS}, token, head * DIMS + column);
  }
}

// Which tile this block works on. Made again where it is needed again: no registers hold it all the time.
struct Place {
  i64 token;
  int rank, blocks, first;  // first: head

  __device__ Place(int block, int tiles, int heads) : rank(cluster_rank()), blocks(cluster_size()) {
    const int task = block / blocks;
    first = task % tiles * heads, token = task / tiles;
  }
};

// Feeders meet the workers: each half of them for itself, for where all threads of a block meet at two places of the program
// synccheck calls them divergent. (And arrivals without a wait, bar.arrive, racecheck does not see.)
template <bool FEEDS>
__device__ __forceinline__ void meet_others() {
  constexpr int THESE = FEEDERS / 2 + WORKERS;
  if (FEEDS) {
    meet<THESE>(WITH_WORKERS + threadIdx.x % FEEDERS / (FEEDERS / 2));
  } else {
    meet<THESE>(WITH_WORKERS), meet<THESE>(WITH_WORKERS + 1);
  }
}

// Of the first chunk everybody widens a share, once it is there.
template <bool FEEDS, int HEADS>
__device__ __forceinline__ void widen_first(Memory<HEADS>& memory) {
  const int warp = threadIdx.x / 32;
  meet_others<FEEDS>();
  widen_box(memory.raw[warp / BOXES], memory.kv[0], warp / BOXES, warp % BOXES);
  meet_others<FEEDS>();
}

// Eight warps bring rows and widen them, a box each, a chunk ahead of the others. One whose box is BF16 already gives names to
// what will be brought; at the start all do.
template <int HEADS>
__device__ __forceinline__ void feed(const Lists& lists, Memory<HEADS>& memory, int tiles) {
  const Place here(blockIdx.x, tiles, HEADS);
  const int warp = threadIdx.x % FEEDERS / 32, chunks = lists.chunks();
  const int halves = 2 * chunks_here(here.rank, here.blocks, chunks);
  const auto bring = [&](int h, Stored& to) {
    if (h < halves) fetch(memory.names[h % NAMED], memory.listed[h % LISTED], to);
    copies_commit();
  };
  Halves named{{here.rank, here.rank}, 0, chunks, here.blocks};
  for (int h = 0; h < warp; h++) named.next();
  pdl_wait();
  named.name(lists, named.row(lists, here.token), memory.names[warp], memory.listed[warp]);
  named.next();
  u32 row = NONE;
  if (warp == BOXES - 1) row = named.row(lists, here.token);
  meet<FEEDERS>(OF_FEEDERS);
#pragma unroll
  for (int h = 0; h < RING; h++) bring(h, memory.raw[h]);
  copies_wait<1>();
  meet<FEEDERS>(OF_FEEDERS);
  widen_first<true>(memory);
  meet<FEEDERS>(OF_FEEDERS);
  bring(RING, memory.raw[0]);
  int slot = 2;  // of the ring
#pragma unroll 1
  for (int h = 2; h < halves; h++) {
    const int b = h / 2 % 2;
    copies_wait<1>();
    meet<FEEDERS>(OF_FEEDERS);  // and what was widened before is through
    bring(h + 2, memory.raw[slot ? slot - 1 : RING - 1]);
    if (warp == BOXES - 1) {
      named.name(lists, row, memory.names[(h + NAMED - 2) % NAMED], memory.listed[(h + NAMED - 2) % LISTED]);
      named.next();
      row = named.row(lists, here.token);
    }
    if (memory.listed[h % LISTED] | memory.listed[(h ^ 1) % LISTED])
      widen_box(memory.raw[slot], memory.kv[b], h % 2, warp);
    slot = slot + 1 < RING ? slot + 1 : 0;
    if (h % 2) meet_others<true>();  // who are through with the chunk before
  }
}

// A cluster has a tile of one token's heads, its block r strands r, r + size, ...: two at most unless it is alone.
template <int M>
__device__ __forceinline__ void work(const bf16* q, int chunks, Memory<16 * M>& memory, int heads, int tiles) {
  constexpr int HEADS = 16 * M;
  const auto [token, rank, blocks, first] = Place(blockIdx.x, tiles, HEADS);
  const int strands = min(chunks, STRANDS), slots = blocks == 1 ? 1 : (strands + blocks - 1) / blocks;
  Tile<M> tile;
  pdl_wait();
  tile.load(q + (token * heads + first) * DIMS, heads - first, memory);
  widen_first<false>(memory);
  int n = 0, slot = 0;
  for (int strand = rank; strand < strands; strand += blocks) {
    for (int end = n + chunks_of(strand, chunks); n < end; n++) {
      const int b = n % 2;
      const u8* const kv = memory.kv[b];
      if (n) meet_others<false>();
      const u32* const half = memory.listed + 2 * n % LISTED;
      const u64 listed = half[0] | static_cast<u64>(half[1]) << 32;
      if (__any_sync(ALL_LANES, listed != 0)) {  // all know it, and the compiler that they do
        float s[M][4], most[2], by[2];
        tile.score(s, memory, kv, listed);
        meet<WORKERS>(OF_WORKERS);
#pragma unroll
        for (int k = 0; k < 2; k++) most[k] = Eight(memory.tops[tile.head + tile.g + 8 * k]).top();
        tile.weigh(s, most, memory);
        tile.decline(most, by);
        meet<WORKERS>(OF_WORKERS);
        tile.add(by, memory, kv);
      }
    }
    if (blocks > 1 || strand + 1 == strands) {
      if (slot + 1 == slots) meet<WORKERS>(OF_WORKERS);  // its place is that of the rows
      tile.lay(memory.of(slot, slots), memory.state[slot]);
      tile.clear(), slot++;
    }
  }
}

// This warp's share of the tile, when all strands are laid down: warp number `warp` of so many of each block.
template <int BATCH, int HEADS>
__device__ __forceinline__ void finish_share(Memory<HEADS>& memory, int warp, int warps, int chunks, const float* sink,
                                             const Turn& turn, int heads, int tiles, const Out& out) {
  const Place here(opaque(blockIdx.x), tiles, HEADS);
  const int count = here.blocks == 1 ? 1 : min(chunks, STRANDS);
#pragma unroll 1
  for (int part = warp * here.blocks + here.rank; part < 2 * HEADS; part += warps * here.blocks) {
    const int head = here.first + part / 2;
    if (head < heads)
      finish<BATCH>(memory, part / 2, part % 2, count, here.blocks, sink[head], turn, here.token, head, heads, out);
  }
}

template <int M>
__device__ __forceinline__ void run(const bf16* q, const Lists& lists, const float* sink, const Turn& turn, int heads,
                                    int tiles, const Out& out) {
  constexpr int HEADS = 16 * M;
  DYNAMIC_SHARED(uint4, shared);
  Memory<HEADS>& memory = *reinterpret_cast<Memory<HEADS>*>(shared);
  pdl_trigger();
  if (threadIdx.x >= WORKERS) {
    Share::give();
    feed(lists, memory, tiles);
    if (cluster_size() > 1) {
      meet_cluster();
    } else {
      meet_others<true>();
      finish_share<1>(memory, threadIdx.x / 32, THREADS / 32, 1, sink, turn, heads, tiles, out);
    }
  } else {
    Share::take();
    work<M>(q, lists.chunks(), memory, heads, tiles);
    const bool alone = cluster_size() == 1;
    if (alone) {
      meet_others<false>();
    } else {
      meet_cluster();
    }
    finish_share<5>(memory, threadIdx.x / 32, (alone ? THREADS : WORKERS) / 32, lists.chunks(), sink, turn, heads, tiles, out);
  }
  if (cluster_size() > 1) leave_cluster();  // others read here until now
}

}  // namespace attend
