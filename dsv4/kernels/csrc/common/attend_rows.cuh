// Rows of the cache on their way to BF16 in shared memory.
#pragma once
#include "common/copy.cuh"
#include "common/mma.cuh"
#include "common/pairs.cuh"

namespace attend {

constexpr int DIMS = 512, TURNED = 64, STRAIGHT = DIMS - TURNED;
constexpr int ROW = STRAIGHT + 2 * TURNED, SCALES = 8;  // bytes of a stored row
constexpr int CHUNK = 64, HALF = CHUNK / 2;             // rows
constexpr int COLUMNS = DIMS / 2;                       // of a block: the others are its neighbour's
constexpr int BOXES = COLUMNS / BOX_COLUMNS, BOX = CHUNK * BOX_BYTES;
constexpr int STRANDS = 32;  // chunk c is of strand c mod 32
constexpr int WORKERS = 256, FEEDERS = 256, THREADS = WORKERS + FEEDERS;
constexpr u32 NONE = 0xFFFFFFFFu;

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

// 16 E4M3 codes times 2^(scale - 127) as BF16: exact, unless there is an `Odd` one.
__device__ __forceinline__ void widened(const uint4& codes, u32 scale, uint4& low, uint4& high) {
  const u32 by = ((scale + 120) << 7) * 0x00010001u;
  const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
  uint2 found[4];
#pragma unroll
  for (int i = 0; i < 4; i++) found[i] = e4m3_pairs(words[i], by);
  low = make_uint4(found[0].x, found[0].y, found[1].x, found[1].y);
  high = make_uint4(found[2].x, found[2].y, found[3].x, found[3].y);
}

// Whether a code is NaN, or a scale such that 2^(scale - 127 + 120) is no BF16 number.
struct Odd {
  u32 changed = 0, scale = 0;

  __device__ void see(const uint4& codes, u32 by) {
    changed |= e4m3_changed(codes);
    scale = max(scale, by);
  }
  __device__ bool any() const { return (changed & 0x80808080u) || scale > 254 - 120; }
};

// The same of any codes and scale, rounded once.
__device__ __forceinline__ uint4 widened_any(uint2 codes, u32 scale) {
  const float by = ue8m0_float(scale);
  u32 found[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 two = (i < 2 ? codes.x : codes.y) >> 16 * (i % 2);
    found[i] = bf16x2(e4m3_float(two & 255) * by, e4m3_float(two >> 8 & 255) * by);
  }
  return make_uint4(found[0], found[1], found[2], found[3]);
}

// The block's half of a chunk's rows as they are stored: codes, or the last codes and BF16. The rows lie so that no eight lanes
// that read at once meet in a bank.
constexpr int PART = ROW - COLUMNS;
static_assert(PART >= COLUMNS && PART % 128 == 64);

struct Stored {
  u8 rows[CHUNK][PART];
};

// Where the rows of a chunk's entries lie, and how far behind their scales.
struct Names {
  const u8* rows[CHUNK];
  u32 scales[CHUNK];
};

// Half of each row of a chunk on its way, four feeders a row. Those whose bit is not in `listed` are zeros. All arrive at
// `brought` when it is there.
__device__ __forceinline__ void fetch(const Names& names, u64 listed, int side, Stored& to, u8 (&scales)[CHUNK][SCALES],
                                      Barrier& brought) {
  constexpr int SHARERS = 4, EACH = COLUMNS / 16 / SHARERS;
  static_assert(FEEDERS == SHARERS * CHUNK);
  const int at = threadIdx.x % FEEDERS / SHARERS, part = threadIdx.x % SHARERS;
  const bool there = listed >> at & 1;
  const u8 *const row = names.rows[at], *const from = row + side * COLUMNS + 16 * part;
  u8* const own = to.rows[at] + 16 * part;
#pragma unroll
  for (int i = 0; i < EACH; i++) copy_async<16>(own + 16 * SHARERS * i, from + 16 * SHARERS * i, there);
  if (side) copy_async<16>(own + 16 * SHARERS * EACH, from + 16 * SHARERS * EACH, there);
  if (part == 0) copy_async<8>(scales[at], row + names.scales[at], there);
  brought.arrive_with_copies();
}

// One box of half a chunk as BF16, by a warp: a lane has 16 columns of every eighth row. rows, scales, kv: from the half's
// first row on. box: of the row's half.
__device__ __forceinline__ void widen_box(const u8 (*rows)[PART], const u8 (*scales)[SCALES], u8* kv, int box, int side) {
  const int lane = threadIdx.x % 32, piece = lane % 4, first = lane / 4;
  const u8* const own = rows[first] + box * BOX_COLUMNS + 16 * piece;
  const u8* const scale_of = scales[first] + side * BOXES + box;
  const int low = box * BOX + first * BOX_BYTES + 16 * (2 * piece ^ first), high = low ^ 16;
  constexpr int ROWS = HALF / 8;
  Odd odd;
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    uint4 a, b;
    const uint4 codes = *reinterpret_cast<const uint4*>(own + 8 * i * PART);
    const u32 scale = scale_of[8 * i * SCALES];
    widened(codes, scale, a, b);
    odd.see(codes, scale);
    *reinterpret_cast<uint4*>(kv + low + 8 * i * BOX_BYTES) = a, *reinterpret_cast<uint4*>(kv + high + 8 * i * BOX_BYTES) = b;
  }
  if (!odd.any()) return;
#pragma unroll 1
  for (int i = 0; i < 2 * ROWS; i++) {
    const int row = i / 2 * 8;
    *reinterpret_cast<uint4*>(kv + (i % 2 ? high : low) + row * BOX_BYTES) =
        widened_any(*reinterpret_cast<const uint2*>(own + row * PART + 8 * (i % 2)), scale_of[row * SCALES]);
  }
}

// The same of the last box of a row, which is BF16: a lane has 8 columns of every fourth row.
__device__ __forceinline__ void widen_last(const u8 (*rows)[PART], u8* kv) {
  const int lane = threadIdx.x % 32, piece = lane % 8, first = lane / 8;
#pragma unroll 4
  for (int i = 0; i < HALF / 4; i++) {
    const int row = first + 4 * i;
    *reinterpret_cast<uint4*>(kv + (BOXES - 1) * BOX + row * BOX_BYTES + 16 * (piece ^ (row & 7))) =
        *reinterpret_cast<const uint4*>(rows[row] + (BOXES - 1) * BOX_COLUMNS + 16 * piece);
  }
}

// The block's half of rows that are BF16 already: a warp has eight rows, of which a lane brings 16 bytes each.
constexpr int WIDE_ROW = 2 * DIMS, WARP_ROWS = CHUNK / (FEEDERS / 32);

// Where the row of the lane's entry lies (the first eight have one), which of them are there, and for whom they are brought.
struct WideRows {
  const u8* from;
  u32 listed;

  __device__ void look(const Lists& lists, i64 token, int chunk) {
    const int lane = threadIdx.x % 32, entry = chunk * CHUNK + threadIdx.x % FEEDERS / 32 * WARP_ROWS + lane;
    const u32 row = lane < WARP_ROWS && chunk >= 0 ? lists.row(token, entry) : NONE;
    listed = __ballot_sync(ALL_LANES, row != NONE);
    from = (entry < lists.near.count ? lists.near.pages : lists.far.pages) + static_cast<i64>(row == NONE ? 0 : row) * WIDE_ROW;
  }
  __device__ void bring(u8* kv, int side) const {
    static_assert(WARP_ROWS == 8 && COLUMNS == 8 * 32);
    const int piece = threadIdx.x % 32, first = threadIdx.x % FEEDERS / 32 * WARP_ROWS;
    u8* const own = kv + piece / 8 * BOX + first * BOX_BYTES;
#pragma unroll
    for (int i = 0; i < WARP_ROWS; i++) {
      const u64 row = __shfl_sync(ALL_LANES, reinterpret_cast<u64>(from), i);
      const u8* const there = reinterpret_cast<const u8*>(row) + side * 2 * COLUMNS + 16 * piece;
      copy_async<16>(own + i * BOX_BYTES + 16 * (piece % 8 ^ i), there, listed >> i & 1);
    }
  }
};

__device__ __forceinline__ int chunks_of(int strand, int chunks) { return (chunks - strand + STRANDS - 1) / STRANDS; }

// The chunks of a stream, one after another: those of its first strand ascending, then of its next. Strand s is of stream s
// mod `streams`. Beyond `chunks` there is none.
struct Walk {
  int chunk, strand, chunks, streams;

  __device__ Walk(int stream, int chunks, int streams)
      : chunk(stream), strand(stream), chunks(chunks), streams(streams) {}
  __device__ bool over() const { return chunk >= chunks; }
  __device__ void next(int times) {
#pragma unroll 1
    for (int i = 0; i < times; i++) {
      chunk += STRANDS;
      if (chunk >= chunks) strand += streams, chunk = strand < STRANDS ? strand : chunks;
    }
  }
};

// How many these are.
__device__ __forceinline__ int chunks_of_stream(int stream, int streams, int chunks) {
  int found = 0;
  for (int strand = stream; strand < min(chunks, STRANDS); strand += streams) found += chunks_of(strand, chunks);
  return found;
}

// The half chunks that a warp names: a lane has one entry.
struct Halves {
  Walk at;
  int half;

  __device__ int entry() const { return at.chunk * CHUNK + half * HALF + static_cast<int>(threadIdx.x) % 32; }
  __device__ u32 row(const Lists& lists, i64 token) const { return at.over() ? NONE : lists.row(token, entry()); }

  // `row`: of this half.
  __device__ void name(const Lists& lists, u32 row, Names& names, u32* listed) const {
    const int lane = threadIdx.x % 32, own = half * HALF + lane;
    const bool there = row != NONE, is_near = entry() < lists.near.count;
    const u32 found = __ballot_sync(ALL_LANES, there);
    if (lane == 0) listed[half] = found;
    const u32 page_rows = is_near ? lists.near.page_rows : lists.far.page_rows;
    const u32 page = there ? row / page_rows : 0, slot = there ? row - page * page_rows : 0;
    names.rows[own] = (is_near ? lists.near.pages : lists.far.pages) +
                      page * (is_near ? lists.near.page_bytes : lists.far.page_bytes) + static_cast<i64>(slot) * ROW;
    names.scales[own] = page_rows * ROW - slot * (ROW - SCALES);
  }
};

}  // namespace attend
