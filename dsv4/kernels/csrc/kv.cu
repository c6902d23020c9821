// Keys and values into the bytes of their cache and back: norm, RoPE, FP8 per 64, one warp a token.
//
// Moves   8,192 tokens of 512 BF16: reads 8 MiB of vectors and 4 MiB of rotations, writes 4.6 MiB. Back: 4.6 in, 8 out.
// Floor   at 3.0 TB/s: 6 us; it all fits the second cache. In sectors 4 % more: a row is 18, and its scales a part of one,
//         which the second cache puts together with those of its neighbours. One token: latency, about 2 us.
// Tried   one warp a token, 4 tokens a block, of any shape: 64 registers, so that 8,192 tokens are two rounds, and about
//         430 instructions a token. The usual shape in a form of its own: two tokens a warp, all at once, 234 a token.
// Measured on an H100, the general form: 9.7 us (0.61 of a copy), back 5.6; one token 2.0 and 1.4. The usual one: not yet.
//
// The row's bytes: dsv4/quant/kv_rows.py. n and dims are multiples of eight, and so is every address in a page.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/formats.cuh"
#include "common/heads.cuh"
#include "common/pairs.cuh"

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

// The usual vectors: 512 BF16 numbers of which the last 64 are turned, all that is read at multiples of 16 bytes, pages of
// 2^shift rows and less than 2^31 bytes. TOKENS tokens a warp; the bits are those of `write_kv`.
constexpr int USUAL = 512, TURNED = 64, STRAIGHT = USUAL - TURNED, CHUNKS = USUAL / WARP_COLUMNS, TOKENS = 2;
constexpr int SHARERS = KV_BLOCK / EIGHT;  // lanes that share a scale

// E4M3 bytes of eight numbers times a power of two. What becomes subnormal on the way is 0 as E4M3.
__device__ __forceinline__ uint2 codes8(const Raw8<bf16>& of, u32 by) {
  const u32 words[4] = {of.words.x, of.words.y, of.words.z, of.words.w};
  u32 codes[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 pair = product_pair(words[i], by);
    codes[i] = e4m3x2(low_float(pair), high_float(pair));
  }
  return make_uint2(codes[0] | codes[1] << 16, codes[2] | codes[3] << 16);
}

// The two turned numbers that are this lane's, of the eight lanes that hold them all.
__device__ __forceinline__ u32 turned_pair(const Raw8<bf16>& of, int lane) {
  const int from = (STRAIGHT - WARP_COLUMNS) / EIGHT + lane / 4;
  const u32 x = __shfl_sync(ALL_LANES, of.words.x, from), y = __shfl_sync(ALL_LANES, of.words.y, from);
  const u32 z = __shfl_sync(ALL_LANES, of.words.z, from), w = __shfl_sync(ALL_LANES, of.words.w, from);
  const u32 low = lane & 1 ? y : x, high = lane & 1 ? w : z;
  return lane & 2 ? high : low;
}

// Scales of both chunks, as `Fp8::scale_byte` has them: BF16 bits are the upper half of FP32's.
struct Scales {
  u32 bytes, inverse;
  u32 broken;  // the highest bit of a half: infinities or NaN

  __device__ explicit Scales(u32 any) {
    constexpr u32 FLOOR = 0x38E038E0u;  // 448 * 2^-22
    const u32 amax = larger_pair(any, FLOOR) & 0x7FFF7FFFu, raised = amax + 0x001F001Fu;
    bytes = (raised >> 7 & 0x00FF00FFu) - 0x00080008u;
    inverse = 0x83008300u - (raised & 0x7F807F80u);  // 254 + 8 less the exponent
    broken = (amax + 0x00800080u) & 0x80008000u;
  }

  // All bits of the halves that are broken.
  __device__ u32 mask() const { return (broken >> 15) * 0xFFFFu; }
};

__device__ __forceinline__ void write_usual(const bf16* x, int stride, int tokens, const float* weight, float eps,
                                            const float* cos, const float* sin, u8* pages, u32 page_bytes, int shift,
                                            const i64* rows) {
  pdl_trigger();
  const int lane = threadIdx.x % 32, first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * TOKENS;
  const auto token = [&](int t) { return min(first + t, tokens - 1); };
  // Rotation and weights were there before the kernel in front of us: they are on their way while that one ends.
  constexpr int SECTORS = TURNED / 8;
  const float* const half = lane & SECTORS ? sin : cos;
  prefetch(half + static_cast<i64>(token(lane / (2 * SECTORS))) * TURNED + lane % SECTORS * 8);
  if (threadIdx.x / 32 == 0) prefetch(weight + lane * (USUAL / 32));
  pdl_wait();
  if (first >= tokens) return;
  // All else that a lane needs is on its way before it waits for any of it.
  Raw8<bf16> raw[TOKENS][CHUNKS];
  i64 to[TOKENS];
  uint2 c[TOKENS], s[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const bf16* const from = x + lane * EIGHT + static_cast<i64>(token(t)) * stride;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) load_whole(raw[t][i], from + i * WARP_COLUMNS);
    to[t] = load8_once(rows + token(t));
    const u32 pair = static_cast<u32>(token(t)) * (TURNED / 2) + lane;
    c[t] = load_pair(cos, pair), s[t] = load_pair(sin, pair);
  }
  float sums[CHUNKS * TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++)
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
      float v[8];
      widen(raw[t][i], v);
      sums[i * TOKENS + t] = square_sum(v);
    }
  const auto add = [](float a, float b) { return a + b; };
  const float chunk = butterflies<32>(sums, lane, add), sum = chunk + __shfl_xor_sync(ALL_LANES, chunk, 16);
  const float own = rms_factor(sum, USUAL, eps);  // of token lane % 16 / (16 / TOKENS)
  float factor[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) factor[t] = __shfl_sync(ALL_LANES, own, t * (16 / TOKENS));
#pragma unroll
  for (int i = CHUNKS - 1; i >= 0; i--) {
    float w[8];  // from the first cache: registers are dearer
    load8_shared(w, weight + i * WARP_COLUMNS + lane * EIGHT, EIGHT, true);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      float v[8];
      widen(raw[t][i], v);
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] = w[j] * (v[j] * factor[t]);
      pack(raw[t][i], v);
    }
  }
  u32 turned[TOKENS], tops[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const u32 pair = turned_pair(raw[t][1], lane);
    const float a = low_float(pair), b = high_float(pair);
    const Turn turn{cos, sin, TURNED, false};
    turned[t] = bf16x2(turn.one(a, b, __uint_as_float(c[t].x), __uint_as_float(s[t].x)),
                       turn.one(b, a, __uint_as_float(c[t].y), __uint_as_float(s[t].y)));
  }
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const u32 top[CHUNKS] = {largest_pair(raw[t][0]), largest_pair(raw[t][1])};
    tops[t] = larger_pair(low_halves(top[0], top[1]), high_halves(top[0], top[1]));
  }
  // Token `known` is the one whose scales this lane gets. Those of the fourth block of chunk 1, which is turned, are a pad.
  const int known = lane % SHARERS / (SHARERS / TOKENS), block = lane / SHARERS;
  Scales scales(butterflies<SHARERS>(tops, lane, larger_pair));
  const auto of_token = [&](u32 word, int t) {
    return __shfl_sync(ALL_LANES, word, block * SHARERS + t * (SHARERS / TOKENS));
  };
  if (__any_sync(ALL_LANES, scales.broken)) {
    const u32 mask = scales.mask();
    scales.bytes |= mask & 0x00FF00FFu, scales.inverse &= ~mask;  // NaN; a positive zero
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const u32 broken = of_token(mask, t);
      if (broken & 1) raw[t][0].words = make_uint4(0, 0, 0, 0);
      if (broken >> 16) raw[t][1].words = make_uint4(0, 0, 0, 0);
    }
  }
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const u32 by = of_token(scales.inverse, t);
    const uint2 codes[CHUNKS] = {codes8(raw[t][0], low_halves(by, by)), codes8(raw[t][1], high_halves(by, by))};
    if (to[t] < 0 || first + t >= tokens) continue;
    const u32 row = static_cast<u32>(to[t]), slot = row & ~(~0u << shift);
    u8* const at = pages + static_cast<u64>(row >> shift) * page_bytes + static_cast<u64>(slot) * (USUAL + TURNED);
    *reinterpret_cast<uint2*>(at + lane * EIGHT) = codes[0];
    if (lane * EIGHT < STRAIGHT - WARP_COLUMNS) *reinterpret_cast<uint2*>(at + WARP_COLUMNS + lane * EIGHT) = codes[1];
    reinterpret_cast<u32*>(at + STRAIGHT)[lane] = turned[t];
    if (known == t && lane % (SHARERS / TOKENS) == 0) {
      u8* const p = at + ((1u << shift) - slot) * (USUAL + TURNED) + slot * EIGHT + block;
      p[0] = scales.bytes, p[4] = block == 3 ? 0 : scales.bytes >> 16;
    }
  }
}

// Eight blocks on a multiprocessor are 64 tokens, so an H100 has 8,192 at once. Those that came later do with seven: they
// have more multiprocessors.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define BLOCKS 7
#else
#define BLOCKS 8
#endif
extern "C" __global__ void __launch_bounds__(128, BLOCKS)
    write_kv_usual(const bf16* x, int stride, int tokens, const float* weight, float eps, const float* cos,
                   const float* sin, u8* pages, int page_bytes, int shift, const i64* rows) {
  write_usual(x, stride, tokens, weight, eps, cos, sin, pages, page_bytes, shift, rows);
}

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
