// Keys and values into the bytes of their cache and back: norm, RoPE, FP8 per 64, one warp a token.
//
// Moves   8,192 tokens of 512 BF16: reads 8 MiB of vectors and 4 MiB of rotations, writes 4.6 MiB. Back: 4.6 in, 8 out.
// Floor   at 3.0 TB/s: 6 us; it all fits the second cache. In sectors 4 % more: a row is 18, and its scales a part of one,
//         which the second cache puts together with those of its neighbours. One token: latency, about 2 us.
// Tried   one warp a token, 4 tokens a block, of any shape: 64 registers, about 430 instructions a token. The usual shape in
//         a form of its own, half of them, on an H100: weights and rotations loaded early 7.2 us (0.81 of a copy; one token
//         1.2), late 7.9 to 8.0; two tokens a warp 7.4 to 8.0, four 7.0 to 7.6 (one token 1.5); rotations prefetched into
//         the second cache 8.9 to 13.6; vectors by cp.async 8.3 and more. Without the rotations' bytes it would be 5.9.
// Measured on an H100, the general form: 9.0 us, back 5.6; one token 1.7 and 1.4.
//
// The row's bytes: dsv4/quant/kv_rows.py. n and dims are multiples of eight, and so is every address in a page.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/kv_rows.cuh"
#include "common/pairs.cuh"

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
    if (turned) turn.eight<T>(v[i], i == V - 1 ? last : turn.angles(at.row, column - first));
    store_kv8(v[i], column, first, turned, out);
  }
  pad_scales(out, first, cache.scale_bytes, at.lane);
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
// 2^shift rows and less than 2^31 bytes. One warp a token; the bits are those of `write_kv`.
constexpr int USUAL = 512, TURNED = 64, STRAIGHT = USUAL - TURNED, CHUNKS = USUAL / WARP_COLUMNS;
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
    bytes = (raised >> 7 & 0x01FF01FFu) - 0x00080008u;  // of NaN too many, but none that borrows of its neighbour
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
  const int lane = threadIdx.x % 32, token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  float w[CHUNKS][8];
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) load8_shared(w[i], weight + i * WARP_COLUMNS + lane * EIGHT, EIGHT, true);
  pdl_wait();
  if (token >= tokens) return;
  // All else that a lane needs is on its way before it waits for any of it.
  const bf16* const from = x + static_cast<i64>(token) * stride + lane * EIGHT;
  Raw8<bf16> raw[CHUNKS];
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) load_whole(raw[i], from + i * WARP_COLUMNS);
  const i64 to = load8_once(rows + token);
  const u32 place = static_cast<u32>(token) * (TURNED / 2) + lane;
  const uint2 c = load_pair(cos, place), s = load_pair(sin, place);
  float sums[CHUNKS];
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    float v[8];
    widen(raw[i], v);
    sums[i] = square_sum(v);
  }
  const float chunk = both_sums(sums, lane), factor = rms_factor(chunk + __shfl_xor_sync(ALL_LANES, chunk, 16), USUAL, eps);
  if (to < 0) return;  // of the whole warp
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    float v[8];
    widen(raw[i], v);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = w[i][j] * (v[j] * factor);
    pack(raw[i], v);
  }
  const u32 pair = turned_pair(raw[1], lane);
  const float even = low_float(pair), odd = high_float(pair);
  const Turn turn{cos, sin, TURNED, false};
  const u32 turned = bf16x2(turn.one(even, odd, __uint_as_float(c.x), __uint_as_float(s.x)),
                            turn.one(odd, even, __uint_as_float(c.y), __uint_as_float(s.y)));
  // Of both chunks at once. The fourth block of the second is turned: it has a pad in place of a scale.
  const u32 first = largest_pair(raw[0]), second = largest_pair(raw[1]);
  u32 top = larger_pair(low_halves(first, second), high_halves(first, second));
#pragma unroll
  for (int other = SHARERS / 2; other; other >>= 1) top = larger_pair(top, __shfl_xor_sync(ALL_LANES, top, other));
  Scales scales(top);
  if (scales.broken) {
    const u32 mask = scales.mask();
    scales.bytes |= mask & 0x00FF00FFu, scales.inverse &= ~mask;  // NaN; a positive zero
    if (mask & 1) raw[0].words = make_uint4(0, 0, 0, 0);
    if (mask >> 16) raw[1].words = make_uint4(0, 0, 0, 0);
  }
  const uint2 codes[CHUNKS] = {codes8(raw[0], low_halves(scales.inverse, scales.inverse)),
                               codes8(raw[1], high_halves(scales.inverse, scales.inverse))};
  const u32 row = static_cast<u32>(to), slot = row & ~(~0u << shift);
  u8* const at = pages + static_cast<u64>(row >> shift) * page_bytes + static_cast<u64>(slot) * (USUAL + TURNED);
  *reinterpret_cast<uint2*>(at + lane * EIGHT) = codes[0];
  if (lane * EIGHT < STRAIGHT - WARP_COLUMNS) *reinterpret_cast<uint2*>(at + WARP_COLUMNS + lane * EIGHT) = codes[1];
  reinterpret_cast<u32*>(at + STRAIGHT)[lane] = turned;
  if (lane % SHARERS == 0) {
    const int block = lane / SHARERS;
    u8* const p = at + ((1u << shift) - slot) * (USUAL + TURNED) + slot * EIGHT + block;
    p[0] = scales.bytes, p[4] = block == 3 ? 0 : scales.bytes >> 16;
  }
}

// Ten blocks on a multiprocessor leave Hopper's compiler the 48 registers that it needs, a later one's no longer.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define BLOCKS 9
#else
#define BLOCKS 10
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
