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

// Half a head: the strands in their order, the sink, the way back. count: strands, dealt out to `blocks`.
template <int HEADS>
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
  constexpr int BATCH = 5;
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

// Four warps bring rows and widen them, a chunk ahead of the others.
template <int HEADS>
__device__ __forceinline__ void feed(const Lists& lists, Memory<HEADS>& memory, int tiles) {
  const Place here(blockIdx.x, tiles, HEADS);
  const int id = threadIdx.x % FEEDERS, lane = threadIdx.x % 32, chunks = lists.chunks();
  Halves coming{{here.rank, here.rank}, 0, chunks, here.blocks}, named = coming;
  int left = 0;
  for (int strand = here.rank; strand < min(chunks, STRANDS); strand += here.blocks)
    left += chunks_of(strand, chunks);
  pdl_wait();
  u32 rows[RING + 1];
#pragma unroll
  for (int h = 0; h <= RING; h++) rows[h] = named.row(lists, here.token), named.next();
#pragma unroll
  for (int h = 0; h < RING; h++) coming.bring(lists, rows[h], memory.raw[h], memory.coming[h]);
  u32 row = rows[RING];
  copies_wait<1>();
  meet<THREADS>(EVERYBODY);
  // Of the first chunk everybody widens a share.
  widen_rows<THREADS>(memory.raw[0], memory.kv[0], threadIdx.x, 0, CHUNK);
  if (id < CHUNK) memory.listed[0][id] = memory.coming[id / HALF][id % HALF];
  meet<THREADS>(EVERYBODY);
  if (lane == 0) memory.full[0].arrive();
  coming.bring(lists, row, memory.raw[0], memory.coming[3]);
  row = coming.row(lists, here.token);
  int slot = 2;  // of the ring
  for (int n = 1; n < left; n++) {
    const int b = n % 2;
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      const int h = 2 * n + half;
      copies_wait<1>();
      meet<FEEDERS>(OF_FEEDERS);  // and what was widened before is through
      const int free = slot ? slot - 1 : RING - 1;
      coming.bring(lists, row, memory.raw[free], memory.coming[(h + 2) % 4]);
      row = coming.row(lists, here.token);
      if (!half && n > 1) memory.empty[b].wait((n / 2 - 1) & 1);
      const int other = half ? h - 1 : h + 1;
      if (__any_sync(ALL_LANES, memory.coming[h % 4][lane] | memory.coming[other % 4][lane]))
        widen_rows<FEEDERS>(memory.raw[slot], memory.kv[b], id, half * HALF, HALF);
      if (id < HALF) memory.listed[b][half * HALF + id] = memory.coming[h % 4][id];
      slot = slot + 1 < RING ? slot + 1 : 0;
    }
    __syncwarp();
    if (lane == 0) memory.full[b].arrive();
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
  meet<THREADS>(EVERYBODY);
  widen_rows<THREADS>(memory.raw[0], memory.kv[0], threadIdx.x, 0, CHUNK);
  meet<THREADS>(EVERYBODY);
  int n = 0, slot = 0;
  for (int strand = rank; strand < strands; strand += blocks) {
    for (int end = n + chunks_of(strand, chunks); n < end; n++) {
      const int b = n % 2;
      const u8* const kv = memory.kv[b];
      const int* const listed = memory.listed[b];
      memory.full[b].wait(n / 2 & 1);
      if (__any_sync(ALL_LANES, listed[tile.lane] | listed[tile.lane + 32])) {
        float s[M][4], most[2];
        tile.score(s, memory, kv, listed);
        meet<WORKERS>(OF_WORKERS);
#pragma unroll
        for (int k = 0; k < 2; k++) most[k] = Eight(memory.tops[tile.head + tile.g + 8 * k]).top();
        tile.weigh(s, most, memory);
        meet<WORKERS>(OF_WORKERS);
        tile.add(most, memory, kv);
      }
      __syncwarp();
      if (tile.lane == 0) memory.empty[b].arrive();
    }
    if (blocks > 1 || strand + 1 == strands) {
      if (slot + 1 == slots) meet<WORKERS>(OF_WORKERS);  // its place is that of the rows
      tile.lay(memory.of(slot, slots), memory.state[slot]);
      tile.clear(), slot++;
    }
  }
}

template <int M>
__device__ __forceinline__ void run(const bf16* q, const Lists& lists, const float* sink, const Turn& turn, int heads,
                                    int tiles, const Out& out) {
  constexpr int HEADS = 16 * M;
  DYNAMIC_SHARED(uint4, shared);
  Memory<HEADS>& memory = *reinterpret_cast<Memory<HEADS>*>(shared);
  pdl_trigger();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) memory.full[i].init(FEEDERS / 32), memory.empty[i].init(WORKERS / 32);
    fence_barriers();
  }
  __syncwarp();
  if (threadIdx.x >= WORKERS) {
    Share<HEADS>::give();
    feed(lists, memory, tiles);
    if (cluster_size() > 1) meet_cluster();
  } else {
    Share<HEADS>::take();
    work<M>(q, lists.chunks(), memory, heads, tiles);
    if (cluster_size() > 1) {
      meet_cluster();
    } else {
      meet<WORKERS>(OF_WORKERS);
    }
    const Place here(opaque(blockIdx.x), tiles, HEADS);
    const int count = here.blocks == 1 ? 1 : min(lists.chunks(), STRANDS);
    for (int part = threadIdx.x / 32 * here.blocks + here.rank; part < 2 * HEADS; part += WORKERS / 32 * here.blocks) {
      const int head = here.first + part / 2;
      if (head < heads)
        finish(memory, part / 2, part % 2, count, here.blocks, sink[head], turn, here.token, head, heads, out);
    }
  }
  if (cluster_size() > 1) leave_cluster();  // others read here until now
}

}  // namespace attend
