// Keys and values into the bytes of their cache and back: norm, RoPE, FP8 per 64, one warp a token.
//
// Moves   8,192 tokens of 512 BF16: reads 8 MiB of vectors and 4 MiB of rotations, writes 4.6 MiB. Back: 4.6 in, 8 out.
// Floor   at 3.0 TB/s: 6 us; it all fits the second cache. In sectors 4 % more: a row is 18, and its scales a part of one,
//         which the second cache puts together with those of its neighbours. One token: latency, about 2 us.
// Tried   one warp a token, 4 tokens a block.
// Measured on an H100, loading row number, vector and rotation one after the other: 9.7 us (0.61 of a copy), back 5.5; one
//         token 2.0 and 1.4. Loading them together: not measured yet.
//
// The row's bytes: dsv4/quant/kv_rows.py. n and dims are multiples of eight, and so is every address in a page.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/formats.cuh"
#include "common/heads.cuh"

constexpr int KV_BLOCK = 64;

// A paged cache, sizes in bytes. Row r lies in page r / page_rows; there are fewer than 2^32 of them.
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

template <class T, int V>
__device__ __forceinline__ void write_kv(const Heads<T>& kv, const float* weight, float eps, const Turn& turn,
                                         const Pages& cache, const i64* rows) {
  pdl_trigger();
  const HeadRow at(kv);
  float w[V][8];
#pragma unroll
  for (int i = 0; i < V; i++) load8_shared(w[i], weight + at.column(i), kv.n - at.column(i), aligned(weight, 0, 16));
  pdl_wait();
  if (!at.live) return;
  // All that a lane needs is on its way before it waits for any of it.
  const int first = kv.n - turn.dims;
  const i64 to = rows[at.row];
  Raw8<T> raw[V];
  at.load<V>(raw, kv);
  Angles last;  // of the last chunk, which often has all that is turned
  const int end = at.column(V - 1);
  if (end >= first && end < kv.n) last = turn.angles(at.row, end - first);
  if (to < 0) return;  // of the whole warp
  float v[V][8], sum = 0;
#pragma unroll
  for (int i = 0; i < V; i++) widen(raw[i], v[i]);
#pragma unroll
  for (int i = 0; i < V; i++) sum += warp_sum(square_sum(v[i]));
  const float factor = rms_factor(sum, kv.n, eps);
  const CacheRow out(cache, to);
#pragma unroll
  for (int i = 0; i < V; i++) {
    const int column = at.column(i);
#pragma unroll
    for (int j = 0; j < 8; j++) v[i][j] = w[i][j] * (v[i][j] * factor);
    rounded8<T>(v[i]);
    const bool turned = column >= first && column < kv.n;
    if (turned) {
      turn.eight<T>(v[i], i == V - 1 ? last : turn.angles(at.row, column - first));
      Raw8<bf16> narrow;
      pack(narrow, v[i]);
      u8* const p = out.row + first + 2 * (column - first);
      if (aligned(p, 0, 16)) {  // half a sector at a time costs twice the stores
        *reinterpret_cast<uint4*>(p) = narrow.words;
      } else {
        reinterpret_cast<uint2*>(p)[0] = make_uint2(narrow.words.x, narrow.words.y);
        reinterpret_cast<uint2*>(p)[1] = make_uint2(narrow.words.z, narrow.words.w);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) v[i][j] = turned ? 0.0f : v[i][j];  // they share no scale with the others
    Fp8<KV_BLOCK>::store(v[i], 1.0f, {out.row, out.scales, first}, 0, column);
  }
  const int used = (first + KV_BLOCK - 1) / KV_BLOCK;
  for (int pad = used + at.lane; pad < cache.scale_bytes; pad += 32) out.scales[pad] = 0;
}

#define WRITE_KV(T, V)                                                                                               \
  extern "C" __global__ void __launch_bounds__(128) write_kv_##T##_##V(                                              \
      const T* x, i64 stride, int tokens, int n, const float* weight, float eps, const float* cos, const float* sin, \
      int dims, u8* pages, i64 page_bytes, int page_rows, int row_bytes, int scale_bytes, const i64* rows) {         \
    write_kv<T, V>({x, stride, 0, tokens, 1, n}, weight, eps, {cos, sin, dims, false},                               \
                   {pages, page_bytes, page_rows, row_bytes, scale_bytes}, rows);                                    \
  }

WRITE_KV(bf16, 1)
WRITE_KV(bf16, 2)
WRITE_KV(float, 1)
WRITE_KV(float, 2)

// BF16 [tokens, n]; a negative row gives zeros.
extern "C" __global__ void __launch_bounds__(256)
    read_kv(u8* pages, i64 page_bytes, int page_rows, int row_bytes, int scale_bytes, const i64* rows, int tokens,
            int n, int dims, bf16* y) {
  pdl_trigger();
  pdl_wait();
  const int token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, first = n - dims;
  if (token >= tokens) return;
  const Pages cache{pages, page_bytes, page_rows, row_bytes, scale_bytes};
  const i64 from = rows[token];
  const CacheRow in(cache, from);
  bf16* const out = y + static_cast<i64>(token) * n;
  for (int column = lane * EIGHT; column < n; column += WARP_COLUMNS) {
    Raw8<bf16> raw;
    raw.words = make_uint4(0, 0, 0, 0);
    if (from >= 0 && column < first) {
      const uint2 codes = *reinterpret_cast<const uint2*>(in.row + column);
      const float scale = ue8m0_float(in.scales[column / KV_BLOCK]);
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] = e4m3_float((j < 4 ? codes.x : codes.y) >> 8 * (j % 4) & 0xFF) * scale;
      pack(raw, v);
    } else if (from >= 0) {
      const uint2* const p = reinterpret_cast<const uint2*>(in.row + first + 2 * (column - first));
      raw.words = make_uint4(p[0].x, p[0].y, p[1].x, p[1].y);
    }
    store_whole(out + column, raw);
  }
}
