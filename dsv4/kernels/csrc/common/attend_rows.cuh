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
// it has the same 8 columns of every row that is its own.
template <int SHARERS>
__device__ __forceinline__ void widen_rows(const u8* raw, u8* kv, int id, int first, int count) {
  const int piece = id % 64, box = piece / 8;
  constexpr int CODES = STRAIGHT / 8;
#pragma unroll 4
  for (int row = id / 64; row < count; row += SHARERS / 64) {
    const u8* const from = raw + row * RAW;
    uint4 numbers;
    if (piece < CODES) {
      numbers = widened(*reinterpret_cast<const uint2*>(from + 8 * piece), from[ROW + box]);
    } else {
      numbers = *reinterpret_cast<const uint4*>(from + STRAIGHT + 16 * (piece - CODES));
    }
    *reinterpret_cast<uint4*>(kv + box * BOX + (first + row) * BOX_BYTES + 16 * ((piece ^ row) & 7)) = numbers;
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

// The halves of a block's chunks, one after another, as a feeder asks for them: it knows the row of the next one.
struct Halves {
  Walk at;
  int half, chunks, blocks;
  u32 row;

  __device__ int entry() const { return at.chunk * CHUNK + half * HALF + threadIdx.x % FEEDERS / 4; }

  __device__ void look(const Lists& lists, i64 token) { row = at.chunk < chunks ? lists.row(token, entry()) : NONE; }

  // The next half, if there is one, and a group of copies in any case.
  __device__ void ask(const Lists& lists, i64 token, u8* raw, int* listed) {
    if (at.chunk < chunks) fetch(lists, entry(), row, raw, listed);
    copies_commit();
    half ^= 1;
    if (!half) at = at.next(chunks, blocks);
    look(lists, token);
  }
};

}  // namespace attend
