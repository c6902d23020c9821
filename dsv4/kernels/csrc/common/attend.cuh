// The body of attend.cu's kernels.
#pragma once
#include "common/copy.cuh"
#include "common/formats.cuh"
#include "common/heads.cuh"
#include "common/mma.cuh"
#include "common/pairs.cuh"
#include "common/peers.cuh"

namespace attend {

constexpr int DIMS = 512, TURNED = 64, STRAIGHT = DIMS - TURNED;
constexpr int ROW = STRAIGHT + 2 * TURNED, SCALES = 8;  // bytes of a stored row
constexpr int RAW = (ROW + SCALES + 15) / 16 * 16;      // of it in shared memory
constexpr int CHUNK = 64, THREADS = 256, WARPS = THREADS / 32, GROUPS = CHUNK / 8;
constexpr int BOXES = DIMS / BOX_COLUMNS, BOX = CHUNK * BOX_BYTES;
constexpr int STRANDS = 32;      // chunk c is of strand c mod 32
constexpr u32 NONE = 0xFFFFFFFFu;
constexpr int PITCH = DIMS + 8;  // floats from head to head of values, so that no two lanes meet in a bank
constexpr float SCALE = 0x1.6a09e6p-5f;  // 512^-0.5

// Rows of a paged cache, and which of them each token attends to.
struct List {
  const u8* pages;
  i64 page_bytes;
  int page_rows;
  const i64* rows;  // [tokens, count]
  int count;
};

struct Lists {
  List near, far;

  __device__ int chunks() const { return (near.count + far.count + CHUNK - 1) / CHUNK; }

  // The row that a token's entry names; NONE, and none behind the last.
  __device__ u32 row(i64 token, int entry) const {
    i64 found = -1;
    if (entry < near.count) {
      found = near.rows[token * near.count + entry];
    } else if (entry - near.count < far.count) {
      found = far.rows[token * far.count + entry - near.count];
    }
    return found < 0 ? NONE : static_cast<u32>(found);
  }
};

// Boxes of queries that registers have room for; the others lie in shared memory.
template <int HEADS>
constexpr int HELD = HEADS > 16 ? BOXES - 2 : BOXES;

// Shared memory of tiles of HEADS heads.
template <int HEADS>
struct Memory {
  u8 raw[2][CHUNK * RAW];
  union {
    u8 kv[BOXES * BOX];
    float values[HEADS * PITCH];  // of the last strand of the block: its rows are no longer read
  };
  u8 weights[HEADS * BOX_BYTES], queries[(BOXES - HELD<HEADS> + (HELD<HEADS> == BOXES)) * HEADS * BOX_BYTES];
  int listed[4][CHUNK];
  float tops[HEADS][GROUPS], sums[HEADS][GROUPS];
  float2 state[2][HEADS];  // of each strand: the largest score, and the sum of weights relative to it
  float before[1];         // [HEADS * PITCH]: values of the first of two strands

  __device__ float* of(int slot, int slots) { return slot + 1 < slots ? before : values; }
};

// The score of a row that is not there.
__device__ __forceinline__ float nothing() { return __uint_as_float(0xFF800000u); }

// What a weight relative to `from` is worth relative to `to`.
__device__ __forceinline__ float decay(float from, float to) { return from == nothing() ? 0.0f : expf(from - to); }

// Two E4M3 codes, each in the upper byte of a half: the same numbers times 2^-120 as BF16.
__device__ __forceinline__ u32 shrunk(u32 codes) { return (codes & 0x80008000u) | (codes >> 4 & 0x07F007F0u); }

// Eight E4M3 codes times 2^(scale - 127) as BF16, each rounded once: exact but for sizes that no cache has.
__device__ __forceinline__ uint4 widened(uint2 codes, u32 scale) {
  constexpr u32 ALL = 0x7F7F7F7Fu, ONE = 0x01010101u;
  u32 found[4];
  const u32 nan = (((codes.x & ALL) + ONE) | ((codes.y & ALL) + ONE)) & 0x80808080u;
  if (nan || scale > 134) {  // 2^(scale - 127 + 120) is no BF16 number
    const float by = ue8m0_float(scale);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 two = (i < 2 ? codes.x : codes.y) >> 16 * (i % 2);
      found[i] = bf16x2(e4m3_float(two & 255) * by, e4m3_float(two >> 8 & 255) * by);
    }
  } else {
    const u32 by = ((scale + 120) << 7) * 0x00010001u;
    found[0] = product_pair(shrunk(__byte_perm(codes.x, 0, 0x1404)), by);
    found[1] = product_pair(shrunk(__byte_perm(codes.x, 0, 0x3424)), by);
    found[2] = product_pair(shrunk(__byte_perm(codes.y, 0, 0x1404)), by);
    found[3] = product_pair(shrunk(__byte_perm(codes.y, 0, 0x3424)), by);
  }
  return make_uint4(found[0], found[1], found[2], found[3]);
}

// A chunk's rows on their way, four threads a row: `row` is this thread's. Absent ones are zeros.
__device__ __forceinline__ void fetch(const Lists& lists, int chunk, u32 row, u8* raw, int* listed) {
  const int at = threadIdx.x / 4, part = threadIdx.x % 4;
  const bool there = row != NONE, is_near = chunk * CHUNK + at < lists.near.count;
  const u32 page_rows = is_near ? lists.near.page_rows : lists.far.page_rows;
  const u32 page = there ? row / page_rows : 0;
  const u32 slot = there ? row - page * page_rows : 0;
  const u8* const start = is_near ? lists.near.pages + page * lists.near.page_bytes
                                  : lists.far.pages + page * lists.far.page_bytes;
  const u8* const from = start + static_cast<i64>(slot) * ROW;
#pragma unroll
  for (int i = 0; i < ROW / 64; i++)
    copy_async<16>(raw + at * RAW + 16 * (part + 4 * i), from + 16 * (part + 4 * i), there);
  if (part) return;
  copy_async<8>(raw + at * RAW + ROW, start + static_cast<i64>(page_rows) * ROW + static_cast<i64>(slot) * SCALES, there);
  listed[at] = there;
}

// The chunk as BF16, in boxes. A thread has the same 8 columns of 16 rows.
__device__ __forceinline__ void widen_rows(const u8* raw, u8* kv) {
  const int piece = threadIdx.x % 64, box = piece / 8;
  constexpr int CODES = STRAIGHT / 8;
#pragma unroll 4
  for (int i = 0; i < CHUNK / 4; i++) {
    const int row = threadIdx.x / 64 + 4 * i;
    const u8* const from = raw + row * RAW;
    uint4 numbers;
    if (piece < CODES) {
      numbers = widened(*reinterpret_cast<const uint2*>(from + 8 * piece), from[ROW + box]);
    } else {
      numbers = *reinterpret_cast<const uint4*>(from + STRAIGHT + 16 * (piece - CODES));
    }
    *reinterpret_cast<uint4*>(kv + box * BOX + row * BOX_BYTES + 16 * ((piece ^ row) & 7)) = numbers;
  }
}

// The eight numbers of a head's groups.
struct Eight {
  float4 low, high;

  __device__ explicit Eight(const float (&of)[GROUPS])
      : low(reinterpret_cast<const float4*>(of)[0]), high(reinterpret_cast<const float4*>(of)[1]) {}
  __device__ float top() const {
    return fmaxf(fmaxf(fmaxf(low.x, low.y), fmaxf(low.z, low.w)), fmaxf(fmaxf(high.x, high.y), fmaxf(high.z, high.w)));
  }
  __device__ float sum() const {
    return ((((((low.x + low.y) + low.z) + low.w) + high.x) + high.y) + high.z) + high.w;
  }
};

// A warp's share of a tile of 16 M heads: for scores 16 heads and M groups of 8 rows, for values 16 heads and M boxes.
template <int M>
struct Tile {
  static constexpr int HEADS = 16 * M, ACROSS = WARPS / M;
  int g, t, lane, head, across;  // head: the first of 16, in the tile
  uint4 low[2 * HELD<HEADS>], high[2 * HELD<HEADS>];  // queries of heads g and g + 8
  float values[M][8][4], top[2], sum[2];  // so far, relative to `top`

  __device__ Tile() : lane(threadIdx.x % 32) {
    const int warp = threadIdx.x / 32;
    g = lane / 4, t = lane % 4, head = warp / ACROSS * 16, across = warp % ACROSS;
    clear();
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int k = 0; k < 4; k++) values[i][j][k] = 0;
    top[0] = top[1] = nothing(), sum[0] = sum[1] = 0;
  }

  // q: the tile's first head; `heads` of them are there.
  __device__ void load(const bf16* q, int heads, Memory<HEADS>& memory) {
#pragma unroll
    for (int i = 0; i < 2 * BOXES; i++) {
      const int piece = 2 * t + i % 2, column = i / 2 * BOX_COLUMNS + piece * EIGHT, one = head + g, other = one + 8;
      uint4 a = make_uint4(0, 0, 0, 0), b = a;
      if (one < heads) a = *reinterpret_cast<const uint4*>(q + one * DIMS + column);
      if (other < heads) b = *reinterpret_cast<const uint4*>(q + other * DIMS + column);
      if (i < 2 * HELD<HEADS>) {
        low[i] = a, high[i] = b;
      } else if (across == 0) {
        u8* const to = memory.queries + ((i / 2 - HELD<HEADS>) * HEADS + one) * BOX_BYTES + 16 * (piece ^ g);
        *reinterpret_cast<uint4*>(to) = a, *reinterpret_cast<uint4*>(to + 8 * BOX_BYTES) = b;
      }
    }
  }

  // Numbers of heads g and g + 8.
  __device__ void query(int i, const Memory<HEADS>& memory, uint4& a, uint4& b) const {
    if (i < 2 * HELD<HEADS>) {
      a = low[i], b = high[i];
    } else {
      const u8* const box = memory.queries + (i / 2 - HELD<HEADS>) * HEADS * BOX_BYTES;
      a = box_piece(box, head + g, 2 * t + i % 2), b = box_piece(box, head + g + 8, 2 * t + i % 2);
    }
  }

  // Scores of the chunk, absent rows with none; each group's largest goes into memory.
  __device__ void score(float (&s)[M][4], Memory<HEADS>& memory, const int* listed) const {
#pragma unroll
    for (int n = 0; n < M; n++) {
      float odd[4] = {}, even[4] = {};
      const int group = across * M + n;
#pragma unroll
      for (int b = 0; b < BOXES; b++) {
        const u8* const box = memory.kv + b * BOX;
#pragma unroll
        for (int h = 0; h < 2; h++) {
          uint4 one, other;
          query(2 * b + h, memory, one, other);
          mma(h ? odd : even, one, other, box_piece(box, 8 * group + g, 2 * t + h));
        }
      }
      const int2 there = *reinterpret_cast<const int2*>(listed + 8 * group + 2 * t);
#pragma unroll
      for (int k = 0; k < 4; k++) s[n][k] = (k % 2 ? there.y : there.x) ? (even[k] + odd[k]) * SCALE : nothing();
#pragma unroll
      for (int k = 0; k < 2; k++) {
        float most = fmaxf(s[n][2 * k], s[n][2 * k + 1]);
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1)), most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
        if (t == 0) memory.tops[head + g + 8 * k][group] = most;
      }
    }
  }

  // Weights relative to the chunk's largest score: rounded into memory, and each group's sum of those that are not.
  __device__ void weigh(const float (&s)[M][4], const float (&most)[2], Memory<HEADS>& memory) const {
#pragma unroll
    for (int n = 0; n < M; n++) {
      const int group = across * M + n;
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const float one = expf(s[n][2 * k] - most[k]), other = expf(s[n][2 * k + 1] - most[k]);
        const int row = head + g + 8 * k;
        *reinterpret_cast<u32*>(memory.weights + row * BOX_BYTES + 16 * (group ^ g) + 4 * t) = bf16x2(one, other);
        float all = one + other;
        all += __shfl_xor_sync(ALL_LANES, all, 1), all += __shfl_xor_sync(ALL_LANES, all, 2);
        if (t == 0) memory.sums[row][group] = all;
      }
    }
  }

  // The chunk's values join those so far.
  __device__ void add(const float (&most)[2], const Memory<HEADS>& memory) {
    float kept[2], by[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const float more = Eight(memory.sums[head + g + 8 * k]).sum(), higher = fmaxf(top[k], most[k]);
      kept[k] = decay(top[k], higher), by[k] = decay(most[k], higher), top[k] = higher;
      sum[k] = fmaf(more, by[k], sum[k] * kept[k]);
    }
    u32 weights[4][4];
    const int row = lane % 16, upper = lane / 16;
#pragma unroll
    for (int step = 0; step < 4; step++)
      load_matrices(weights[step], memory.weights + (head + row) * BOX_BYTES + 16 * ((2 * step + upper) ^ (row & 7)));
#pragma unroll
    for (int i = 0; i < M; i++) {
      const u8* const box = memory.kv + (across * M + i) * BOX + row * BOX_BYTES;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        float d[2][4] = {};
#pragma unroll
        for (int step = 0; step < 4; step++) {
          u32 numbers[4];
          load_turned(numbers, box + 16 * step * BOX_BYTES + 16 * ((j + upper) ^ (row & 7)));
          mma16(d[0], weights[step], numbers[0], numbers[1]);
          mma16(d[1], weights[step], numbers[2], numbers[3]);
        }
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int k = 0; k < 4; k++)
            values[i][j + h][k] = fmaf(d[h][k], by[k / 2], values[i][j + h][k] * kept[k / 2]);
      }
    }
  }

  // What a strand came to.
  __device__ void lay(float* to, float2 (&state)[HEADS]) const {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int one = head + g + 8 * k;
      if (across == 0 && t == 0) state[one] = make_float2(top[k], sum[k]);
#pragma unroll
      for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
          *reinterpret_cast<float2*>(to + one * PITCH + (across * M + i) * BOX_COLUMNS + 8 * j + 2 * t) =
              make_float2(values[i][j][2 * k], values[i][j][2 * k + 1]);
    }
  }
};

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
  float v[8] = {}, sum = 0;
  int rank = 0, slot = 0;
#pragma unroll 4
  for (int s = 0; s < count; s++) {
    const float* const from = memory.of(slot, slots) + one * PITCH + column;
    const float4 low = load_from(from, rank), high = load_from(from + 4, rank);
    const float more[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const float a = __shfl_sync(ALL_LANES, kept, s), b = __shfl_sync(ALL_LANES, by, s);
    sum = fmaf(__shfl_sync(ALL_LANES, own.y, s), b, sum * a);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = fmaf(more[i], b, v[i] * a);
    if (++rank == blocks) rank = 0, slot++;
  }
  const float most = __shfl_sync(ALL_LANES, top, 31);
  sum += most == nothing() ? 1.0f : expf(sink - most);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = v[i] / sum;
  rounded8<bf16>(v);
  if (column >= STRAIGHT) turn.eight<bf16>(v, token, column - STRAIGHT);
  if (out.y) {
    store8(out.y + (token * heads + head) * DIMS + column, v, EIGHT, true);
  } else {
    Fp8Row::store(v, 1.0f, {out.data, out.scale, heads * DIMS}, token, head * DIMS + column);
  }
}

// A strand's next chunk, or the first of the block's next strand; beyond `chunks` there is none.
struct Walk {
  int chunk, strand;

  __device__ Walk next(int chunks, int blocks) const {
    if (chunk + STRANDS < chunks) return {chunk + STRANDS, strand};
    return {strand + blocks < STRANDS ? strand + blocks : chunks, strand + blocks};
  }
};

// Which tile this block works on. Made again where it is needed again: no registers hold it all the time.
struct Place {
  i64 token;
  int rank, blocks, first;  // first: head

  __device__ Place(int block, int tiles, int heads) : rank(cluster_rank()), blocks(cluster_size()) {
    const int task = block / blocks;
    first = task % tiles * heads, token = task / tiles;
  }
};

// A cluster has a tile of one token's heads, its block r strands r, r + size, ...: two at most unless it is alone.
template <int M>
__device__ __forceinline__ void run(const bf16* q, const Lists& lists, const float* sink, const Turn& turn, int heads,
                                    int tiles, const Out& out) {
  constexpr int HEADS = 16 * M;
  DYNAMIC_SHARED(uint4, shared);
  Memory<HEADS>& memory = *reinterpret_cast<Memory<HEADS>*>(shared);
  const int chunks = lists.chunks(), row = threadIdx.x / 4;
  const auto [token, rank, blocks, first] = Place(blockIdx.x, tiles, HEADS);
  const bool alone = blocks == 1;
  const int slots = alone ? 1 : (min(chunks, STRANDS) + blocks - 1) / blocks;
  pdl_trigger();
  Tile<M> tile;
  pdl_wait();
  Walk at{rank, rank};
  fetch(lists, at.chunk, lists.row(token, at.chunk * CHUNK + row), memory.raw[0], memory.listed[0]);
  copies_commit();
  at = at.next(chunks, blocks);
  u32 ahead = lists.row(token, at.chunk * CHUNK + row);
  tile.load(q + (static_cast<i64>(token) * heads + first) * DIMS, heads - first, memory);
  for (int i = 0, slot = 0, strand = rank;; i++) {
    // `at` is the chunk behind the one that is worked on, whose strand is `strand`.
    const bool over = at.chunk >= chunks;
    if (!over) fetch(lists, at.chunk, ahead, memory.raw[(i + 1) % 2], memory.listed[(i + 1) % 4]);
    copies_commit();
    const bool ends = alone ? over : at.strand != strand;
    strand = at.strand, at = at.next(chunks, blocks);
    ahead = lists.row(opaque(blockIdx.x) / (tiles * blocks), at.chunk * CHUNK + row);
    copies_wait<1>();
    __syncthreads();
    // Whoever is a chunk ahead writes other flags: there are four of each.
    const int* const listed = memory.listed[i % 4];
    if (__any_sync(ALL_LANES, listed[tile.lane] | listed[tile.lane + 32])) {
      widen_rows(memory.raw[i % 2], memory.kv);
      __syncthreads();
      float s[M][4], most[2];
      tile.score(s, memory, listed);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < 2; k++) most[k] = Eight(memory.tops[tile.head + tile.g + 8 * k]).top();
      tile.weigh(s, most, memory);
      __syncthreads();
      tile.add(most, memory);
    }
    if (ends) {
      if (slot + 1 == slots) __syncthreads();  // its place is that of the rows
      tile.lay(memory.of(slot, slots), memory.state[slot]);
      tile.clear(), slot++;
    }
    if (over) break;
  }
  meet_cluster();
  const Place here(opaque(blockIdx.x), tiles, HEADS);
  const int count = here.blocks == 1 ? 1 : min(lists.chunks(), STRANDS);
  for (int part = threadIdx.x / 32 * here.blocks + here.rank; part < 2 * HEADS; part += WARPS * here.blocks) {
    const int head = here.first + part / 2;
    if (head < heads) finish(memory, part / 2, part % 2, count, here.blocks, sink[head], turn, here.token, head, heads, out);
  }
  meet_cluster();  // others read here until now
}

}  // namespace attend
