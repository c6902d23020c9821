// Rows of keys and values in the pages of a cache. Their bytes: dsv4/quant/kv_rows.py.
#pragma once
#include "common/formats.cuh"
#include "common/heads.cuh"

constexpr int KV_BLOCK = 64;

// A paged cache, sizes in bytes: page_bytes from one page to the next. Row r lies in page r / page_rows; there are fewer
// than 2^32 of them.
struct Pages {
  u8* pages;
  i64 page_bytes;
  int page_rows, row_bytes, scale_bytes;
};

// The two places of one row.
struct CacheRow {
  u8 *row, *scales;

  __device__ CacheRow(const Pages& cache, i64 r) {
    const u32 page = static_cast<u32>(r) / static_cast<u32>(cache.page_rows),
              slot = static_cast<u32>(r) - page * cache.page_rows;
    u8* const start = cache.pages + page * cache.page_bytes;
    row = start + static_cast<i64>(slot) * cache.row_bytes;
    scales = start + static_cast<i64>(cache.page_rows) * cache.row_bytes + static_cast<i64>(slot) * cache.scale_bytes;
  }
};

// Eight numbers from `column` on of a row of `first` straight ones and then turned ones, by whole warps.
__device__ __forceinline__ void store_kv8(float (&v)[8], int column, int first, bool turned, const CacheRow& out) {
  if (turned) {
    Raw8<bf16> narrow;
    pack(narrow, v);
    u8* const p = out.row + first + 2 * (column - first);
    if (aligned(p, 0, 16)) {  // half a sector at a time costs twice the stores
      *reinterpret_cast<uint4*>(p) = narrow.words;
    } else {
      reinterpret_cast<uint2*>(p)[0] = make_uint2(narrow.words.x, narrow.words.y);
      reinterpret_cast<uint2*>(p)[1] = make_uint2(narrow.words.z, narrow.words.w);
    }
  }
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = turned ? 0.0f : v[j];  // they share no scale with the others
  Fp8<KV_BLOCK>::store(v, 1.0f, {out.row, out.scales, first}, 0, column);
}

// Zeros behind the scales.
__device__ __forceinline__ void pad_scales(const CacheRow& out, int first, int scale_bytes, int lane) {
  const int used = (first + KV_BLOCK - 1) / KV_BLOCK;
#pragma unroll 1
  for (int pad = used + lane; pad < scale_bytes; pad += 32) out.scales[pad] = 0;
}
