// Rows of the cache on their way into shared memory and to BF16.
#pragma once
#include "common/copy.cuh"
#include "common/mma.cuh"
#include "common/pairs.cuh"

namespace attend {

constexpr int DIMS = 512, TURNED = 64, STRAIGHT = DIMS - TURNED;
constexpr int ROW = STRAIGHT + 2 * TURNED, SCALES = 8;  // bytes of a stored row
constexpr int RAW = (ROW + SCALES + 15) / 16 * 16;      // of it in shared memory
constexpr int CHUNK = 64, HALF = CHUNK / 2;             // rows
constexpr int BOXES = DIMS / BOX_COLUMNS, BOX = CHUNK * BOX_BYTES;
constexpr int STRANDS = 32;  // chunk c is of strand c mod 32
constexpr int WORKERS = 256, FEEDERS = 128, THREADS = WORKERS + FEEDERS;
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

// Two E4M3 codes, each in the upper byte of a half: the same numbers times 2^-120 as BF16.
__device__ __forceinline__ u32 shrunk(u32 codes) { return (codes & 0x80008000u) | (codes >> 4 & 0x07F007F0u); }

// Eight E4M3 codes times 2^(scale - 127) as BF16: exact. Any bit of `odd`: not so, for a code is NaN, or 2^(scale - 127 +
// 120) no BF16 number.
__device__ __forceinline__ uint4 widened(uint2 codes, u32 scale, u32& odd) {
  constexpr u32 SIZES = 0x7F7F7F7Fu, ONE = 0x01010101u;
  odd |= ((((codes.x & SIZES) + ONE) | ((codes.y & SIZES) + ONE)) & 0x80808080u) | ((scale + 121) & 256);
  const u32 by = ((scale + 120) << 7) * 0x00010001u;
  return make_uint4(product_pair(shrunk(__byte_perm(codes.x, 0, 0x1404)), by),
                    product_pair(shrunk(__byte_perm(codes.x, 0, 0x3424)), by),
                    product_pair(shrunk(__byte_perm(codes.y, 0, 0x1404)), by),
                    product_pair(shrunk(__byte_perm(codes.y, 0, 0x3424)), by));
}

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

// Half a chunk's rows on their way, four feeders a row: `row` is this thread's. Absent ones are zeros.
__device__ __forceinline__ void fetch(const Lists& lists, int entry, u32 row, u8* raw, int* listed) {
  const int at = threadIdx.x % FEEDERS / 4, part = threadIdx.x % 4;
  const bool there = row != NONE, is_near = entry < lists.near.count;
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

// `count` rows as BF16, in boxes, the first of them row `first` of the chunk. SHARERS threads, of which this is number `id`:
// it has the same 8 columns of every row that is its own, four rows at a time.
template <int SHARERS>
__device__ __forceinline__ void widen_rows(const u8* raw, u8* kv, int id, int first, int count) {
  constexpr int CODES = STRAIGHT / 8, STEP = SHARERS / 64, FOUR = 4;
  const int piece = id % 64, box = piece / 8;
  const bool coded = piece < CODES;
  const u8* const own = raw + (coded ? 8 * piece : STRAIGHT + 16 * (piece - CODES));
  const u8* const scales = raw + ROW + box;
  u8* const to = kv + box * BOX;
#pragma unroll 1
  for (int row = id / 64; row < count; row += FOUR * STEP) {
    uint2 low[FOUR], high[FOUR];
    u32 scale[FOUR], odd = 0;
#pragma unroll
    for (int i = 0; i < FOUR; i++) {
      const int at = min(row + i * STEP, count - 1) * RAW;
      low[i] = *reinterpret_cast<const uint2*>(own + at), high[i] = make_uint2(0, 0), scale[i] = scales[at];
      if (!coded) high[i] = *reinterpret_cast<const uint2*>(own + at + 8);
    }
#pragma unroll
    for (int i = 0; i < FOUR; i++) {
      const int at = row + i * STEP;
      uint4 numbers = widened(low[i], scale[i], odd);
      if (!coded) numbers = make_uint4(low[i].x, low[i].y, high[i].x, high[i].y);
      if (at < count)
        *reinterpret_cast<uint4*>(to + (first + at) * BOX_BYTES + 16 * ((piece ^ at) & 7)) = numbers;
    }
    if (odd && coded) {
#pragma unroll 1
      for (int at = row; at < min(row + FOUR * STEP, count); at += STEP)
        *reinterpret_cast<uint4*>(to + (first + at) * BOX_BYTES + 16 * ((piece ^ at) & 7)) =
            widened_any(*reinterpret_cast<const uint2*>(own + at * RAW), scales[at * RAW]);
    }
  }
}

__device__ __forceinline__ int chunks_of(int strand, int chunks) { return (chunks - strand + STRANDS - 1) / STRANDS; }

// A strand's next chunk, or the first of the block's next strand; beyond `chunks` there is none.
struct Walk {
  int chunk, strand;

  __device__ Walk next(int chunks, int blocks) const {
    if (chunk + STRANDS < chunks) return {chunk + STRANDS, strand};
    return {strand + blocks < STRANDS ? strand + blocks : chunks, strand + blocks};
  }
};

// The halves of a block's chunks, one after another, as a feeder asks for them.
struct Halves {
  Walk at;
  int half, chunks, blocks;

  __device__ bool there() const { return at.chunk < chunks; }
  __device__ int entry() const { return at.chunk * CHUNK + half * HALF + threadIdx.x % FEEDERS / 4; }
  __device__ u32 row(const Lists& lists, i64 token) const { return there() ? lists.row(token, entry()) : NONE; }

  __device__ void next() {
    half ^= 1;
    if (!half) at = at.next(chunks, blocks);
  }

  // This half, if there is one, and a group of copies in any case.
  __device__ void bring(const Lists& lists, u32 row, u8* raw, int* listed) {
    if (there()) fetch(lists, entry(), row, raw, listed);
    copies_commit();
    next();
  }
};

}  // namespace attend
