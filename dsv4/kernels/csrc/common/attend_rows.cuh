// Rows of the cache on their way into shared memory and to BF16.
#pragma once
#include "common/copy.cuh"
#include "common/mma.cuh"
#include "common/pairs.cuh"

namespace attend {

constexpr int DIMS = 512, TURNED = 64, STRAIGHT = DIMS - TURNED;
constexpr int ROW = STRAIGHT + 2 * TURNED, SCALES = 8;  // bytes of a stored row
constexpr int CHUNK = 64, HALF = CHUNK / 2;             // rows
constexpr int BOXES = DIMS / BOX_COLUMNS, BOX = CHUNK * BOX_BYTES;
constexpr int STRANDS = 32;  // chunk c is of strand c mod 32
constexpr int WORKERS = 256, FEEDERS = 256, THREADS = WORKERS + FEEDERS;
constexpr u32 NONE = 0xFFFFFFFFu;
static_assert(BOXES == FEEDERS / 32 && 2 * BOXES == THREADS / 32, "a warp for each box of half a chunk");

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
  u32 found[8];
#pragma unroll
  for (int i = 0; i < 4; i++) {  // the bytes of BF16 numbers that are 2^-120 times what the codes are
    const u32 upper = (words[i] & 0x80808080u) | (words[i] >> 4 & 0x07070707u), lower = words[i] << 4 & 0xF0F0F0F0u;
    found[2 * i] = product_pair(__byte_perm(lower, upper, 0x5140), by);
    found[2 * i + 1] = product_pair(__byte_perm(lower, upper, 0x7362), by);
  }
  low = make_uint4(found[0], found[1], found[2], found[3]), high = make_uint4(found[4], found[5], found[6], found[7]);
}

// Whether a code is NaN, or a scale such that 2^(scale - 127 + 120) is no BF16 number. Adding one to each byte changes the
// upper bit of one that is NaN, and of no other unless a NaN below has carried.
struct Odd {
  u32 changed = 0, scale = 0;

  __device__ void see(const uint4& codes, u32 by) {
    constexpr u32 ONE = 0x01010101u;
    changed |= (codes.x + ONE) ^ codes.x, changed |= (codes.y + ONE) ^ codes.y;
    changed |= (codes.z + ONE) ^ codes.z, changed |= (codes.w + ONE) ^ codes.w;
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

// Half of a chunk as it is stored.
struct Stored {
  u8 rows[HALF * ROW], scales[HALF * SCALES];
};

// Where an entry's row lies, and its scales.
struct Name {
  const u8 *row, *scales;
};

// Half a chunk's rows on their way, eight feeders a row. Those whose bit is not in `listed` are zeros.
__device__ __forceinline__ void fetch(const Name* names, u32 listed, Stored& to) {
  constexpr int SHARERS = FEEDERS / HALF, WHOLE = ROW / 16 / SHARERS, REST = ROW / 16 % SHARERS;
  const int at = threadIdx.x % FEEDERS / SHARERS, part = threadIdx.x % SHARERS;
  const bool there = listed >> at & 1;
  const Name from = names[at];
  u8* const row = to.rows + at * ROW;
#pragma unroll
  for (int i = 0; i < WHOLE; i++)
    copy_async<16>(row + 16 * (part + SHARERS * i), from.row + 16 * (part + SHARERS * i), there);
  if (part < REST) copy_async<16>(row + 16 * (part + SHARERS * WHOLE), from.row + 16 * (part + SHARERS * WHOLE), there);
  if (part == REST) copy_async<8>(to.scales + at * SCALES, from.scales, there);
}

// One box of half a chunk as BF16, by a warp: a lane has 16 columns of every eighth row. So all its addresses are one and a
// constant, and no eight lanes meet in a bank.
__device__ __forceinline__ void widen_box(const Stored& from, u8* kv, int half, int box) {
  constexpr int EIGHTH = HALF / 8;
  const int lane = threadIdx.x % 32, piece = lane % 4, first = lane / 4;
  u8* const whole = kv + box * BOX + half * HALF * BOX_BYTES;
  if (box == BOXES - 1) {  // BF16 already: a lane has 8 columns of every fourth row
#pragma unroll
    for (int i = 0; i < HALF / 4; i++) {
      const int row = lane / 8 + 4 * i;
      *reinterpret_cast<uint4*>(whole + row * BOX_BYTES + 16 * (lane % 8 ^ (row & 7))) =
          *reinterpret_cast<const uint4*>(from.rows + row * ROW + STRAIGHT + 16 * (lane % 8));
    }
    return;
  }
  u8* const to = whole + first * BOX_BYTES;
  const u8* const own = from.rows + first * ROW + box * BOX_COLUMNS + 16 * piece;
  const u8* const scales = from.scales + first * SCALES + box;
  u8* const low = to + 16 * (2 * piece ^ first);
  u8* const high = to + 16 * ((2 * piece + 1) ^ first);
  uint4 codes[EIGHTH];
  u32 scale[EIGHTH];
  Odd odd;
#pragma unroll
  for (int i = 0; i < EIGHTH; i++)
    codes[i] = *reinterpret_cast<const uint4*>(own + 8 * i * ROW), scale[i] = scales[8 * i * SCALES];
#pragma unroll
  for (int i = 0; i < EIGHTH; i++) {
    uint4 a, b;
    widened(codes[i], scale[i], a, b);
    odd.see(codes[i], scale[i]);
    *reinterpret_cast<uint4*>(low + 8 * i * BOX_BYTES) = a, *reinterpret_cast<uint4*>(high + 8 * i * BOX_BYTES) = b;
  }
  if (!odd.any()) return;
#pragma unroll 1
  for (int i = 0; i < 2 * EIGHTH; i++) {
    const int row = i / 2 * 8;
    *reinterpret_cast<uint4*>((i % 2 ? high : low) + row * BOX_BYTES) =
        widened_any(*reinterpret_cast<const uint2*>(own + row * ROW + 8 * (i % 2)), scales[row * SCALES]);
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

// Of the chunks the block `rank` of so many.
__device__ __forceinline__ int chunks_here(int rank, int blocks, int chunks) {
  int found = 0;
  for (int strand = rank; strand < min(chunks, STRANDS); strand += blocks) found += chunks_of(strand, chunks);
  return found;
}

// The halves of a block's chunks, one after another, as a warp names them: a lane has one entry.
struct Halves {
  Walk at;
  int half, chunks, blocks;

  __device__ int entry() const { return at.chunk * CHUNK + half * HALF + static_cast<int>(threadIdx.x) % 32; }
  __device__ u32 row(const Lists& lists, i64 token) const { return at.chunk < chunks ? lists.row(token, entry()) : NONE; }
  __device__ void next() {
    half ^= 1;
    if (!half) at = at.next(chunks, blocks);
  }

  // `row`: of this half.
  __device__ void name(const Lists& lists, u32 row, Name* names, u32& listed) const {
    const int lane = threadIdx.x % 32;
    const u32 found = __ballot_sync(ALL_LANES, row != NONE);
    if (lane == 0) listed = found;
    const bool is_near = entry() < lists.near.count;
    const u32 page_rows = is_near ? lists.near.page_rows : lists.far.page_rows;
    const u32 page = row != NONE ? row / page_rows : 0, slot = row != NONE ? row - page * page_rows : 0;
    const u8* const start = is_near ? lists.near.pages + page * lists.near.page_bytes
                                    : lists.far.pages + page * lists.far.page_bytes;
    names[lane] = {start + static_cast<i64>(slot) * ROW, start + static_cast<i64>(page_rows) * ROW + slot * SCALES};
  }
};

}  // namespace attend
