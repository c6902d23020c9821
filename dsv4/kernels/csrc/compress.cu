// Compressors: what tokens add to their blocks goes to a ring, and blocks that end are pooled, normalised, turned to
// their first position and stored.
//
// Moves   8,192 tokens of ratio 4 into rows of 512: reads 64 MiB of terms, writes 1.1 MiB of rows, and as much of the
//         ring as is kept of a sequence (8 KiB a token). Ratio 128 half of that, index keys a quarter. One token that
//         ends a block of 128: 0.5 MiB, by one block of threads; of 4: 32 KiB.
// Floor   at 3.0 TB/s: 22 us, 11 us at ratio 128, 6 us of index keys. One token: latency.
// Form    a block of threads a token, four channels a thread; at ratio 128 four runs of rows. Whether a block ends here
//         is seen on the device. Of few tokens one launch does both: a term of this step is read from where the product
//         left it and not from the ring, which another block of threads may write. Of many, blocks take several tokens
//         each, and a second launch writes the ring.
// Measured on an H100 (bench/results/2026-11-27-ops-second.jsonl): one token that ends a block 4.3 us at ratio 4, 11.4 at
//         128, 3.7 of index keys; one that ends none 1.4. 8,192 tokens 39, 25 and 17 us.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/index_vectors.cuh"
#include "common/kv_rows.cuh"
#include "common/pool.cuh"

constexpr int TURNED = 64;

// What threads of a block tell each other. Two entries, used in turn: the first warp stores one while the others pool
// the next.
template <int DIMS>
struct __align__(16) Entries {
  float entry[2][DIMS], turn[2][2 * TURNED], norm[DIMS];
};

// An entry in the registers of one warp, eight columns a lane and chunk, normalised and turned as rows of BF16 are.
template <int DIMS>
struct Entry {
  static constexpr int V = (DIMS + WARP_COLUMNS - 1) / WARP_COLUMNS, FIRST = DIMS - TURNED;
  float v[V][8];
  int lane;

  __device__ int column(int i) const { return i * WARP_COLUMNS + lane * EIGHT; }
  __device__ bool turned(int i) const { return column(i) >= FIRST && column(i) < DIMS; }

  __device__ Entry(const Entries<DIMS>& from, int which, float eps) : lane(threadIdx.x % 32) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < V; i++) read(v[i], from.entry[which], i);
#pragma unroll
    for (int i = 0; i < V; i++) sum += warp_sum(square_sum(v[i]));
    const float factor = rms_factor(sum, DIMS, eps);
#pragma unroll
    for (int i = 0; i < V; i++) {
      float w[8];
      read(w, from.norm, i);
#pragma unroll
      for (int j = 0; j < 8; j++) v[i][j] = w[j] * (v[i][j] * factor);
      rounded8<bf16>(v[i]);
      if (turned(i)) {
        const Turn by{from.turn[which], from.turn[which] + TURNED, TURNED, false};
        by.eight<bf16>(v[i], 0, column(i) - FIRST);
      }
    }
  }

  // Zeros past the row's end.
  __device__ void read(float (&v)[8], const float* from, int i) const {
    load8_shared(v, from + column(i), DIMS - column(i), true);
  }
};

struct KvRows {
  static constexpr int DIMS = 512;
  Pages pages;

  __device__ void store(Entry<DIMS>& entry, i64 row) const {
    const CacheRow out(pages, row);
#pragma unroll
    for (int i = 0; i < entry.V; i++) store_kv8(entry.v[i], entry.column(i), entry.FIRST, entry.turned(i), out);
    pad_scales(out, entry.FIRST, pages.scale_bytes, entry.lane);
  }
};

// Index keys, in the lower half of a warp; the upper one has zeros.
template <class Layout>
struct Keys {
  static constexpr int DIMS = index_vectors::DIMS;
  Pages pages;
  int spread;  // by a Hadamard matrix

  __device__ void store(Entry<DIMS>& entry, i64 row) const {
    if (spread) index_vectors::hadamard(entry.v[0], entry.lane);
    const CacheRow out(pages, row);
    Layout::store(entry.v[0], entry.column(0), out.row, out.scales);
  }
};

struct Finish {
  const float* norm;
  float eps;
  const float *cos, *sin;  // of every token's block
  int keep;                // whether the ring is written too: of one token a block of threads
};

template <class B, class Rows>
__device__ __forceinline__ void compress(const Step& step, const Finish& finish, const Rows& to,
                                         Entries<B::DIMS>& shared, float* parts) {
  pdl_trigger();
  const int lane = threadIdx.x % 32, run = threadIdx.x / B::LANES, channel = threadIdx.x % B::LANES * 4;
  if (run == 0) {
    float w[4];
    load4_shared(w, finish.norm + channel);
    store4(shared.norm + channel, w);
  }
  pdl_wait();
  const int first = blockIdx.x * step.each, count = min(step.each, step.tokens - first);
  const bool ends = lane < count && step.ends(first + lane, B::RATIO);
  int which = 0;
  for (u32 left = __ballot_sync(ALL_LANES, ends); left; left &= left - 1, which ^= 1) {  // the same in every warp
    const int token = first + __ffs(left) - 1;
    const i64 slot = step.slots[token], position = step.positions[token];
    float angles[4];
    if (threadIdx.x < 32) {
      const int half = TURNED / 4, at = lane % half * 4;
      load4(angles, (lane < half ? finish.cos : finish.sin) + static_cast<i64>(token) * TURNED + at);
    }
    Pooled pooled = pool_run<B>(step, token, slot, position, run, channel);
    merge_runs<B>(pooled, run, channel, parts);
    if (threadIdx.x < 32) store4(shared.turn[which] + lane * 4, angles);
    if (run == 0) {
      float entry[4];
#pragma unroll
      for (int c = 0; c < 4; c++) entry[c] = round_bf16(pooled.value[c] / pooled.sum[c]);
      store4(shared.entry[which] + channel, entry);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      Entry<B::DIMS> entry(shared, which, finish.eps);
      to.store(entry, step.rows[token]);
    }
  }
  if (finish.keep && step.keeps(first)) keep_terms(step, first, B::RATIO, B::CHANNELS);
}

#define STEP                                                                                                         \
  const float *projected, i64 stride, const float *ape, const i64 *slots, const i64 *positions, const i64 *rows,     \
      int tokens, int each, float *ring, int length
#define FINISH const float *norm, float eps, const float *cos, const float *sin, int keep

#define COMPRESS_KV(RATIO, COUNT)                                                                                    \
  extern "C" __global__ void __launch_bounds__(COUNT) compress_kv_##RATIO(                                           \
      STEP, FINISH, u8* pages, i64 page_bytes, int page_rows, int row_bytes, int scale_bytes) {                      \
    using B = Blocks<RATIO, 512>;                                                                                    \
    static_assert(B::THREADS == COUNT);                                                                              \
    __shared__ Entries<512> shared;                                                                                  \
    __shared__ float4 parts[(B::RUNS - 1) * 3 * B::LANES + 1];                                                       \
    compress<B>({projected, stride, ape, slots, positions, rows, tokens, each, ring, length},                        \
                {norm, eps, cos, sin, keep}, KvRows{{pages, page_bytes, page_rows, row_bytes, scale_bytes}}, shared, \
                &parts[0].x);                                                                                        \
  }

COMPRESS_KV(4, 128)
COMPRESS_KV(128, 512)

#define COMPRESS_KEYS(format, Format)                                                                                \
  extern "C" __global__ void __launch_bounds__(32) compress_keys_##format(                                           \
      STEP, FINISH, u8* pages, i64 page_bytes, int page_rows, int row_bytes, int scale_bytes, int spread) {          \
    using B = Blocks<4, 128>;                                                                                        \
    static_assert(B::THREADS == 32 && B::RUNS == 1);                                                                 \
    __shared__ Entries<128> shared;                                                                                  \
    Keys<index_vectors::Format> to;                                                                                  \
    to.pages = {pages, page_bytes, page_rows, row_bytes, scale_bytes}, to.spread = spread;                           \
    compress<B>({projected, stride, ape, slots, positions, rows, tokens, each, ring, length},                        \
                {norm, eps, cos, sin, keep}, to, shared, nullptr);                                                   \
  }

COMPRESS_KEYS(fp4, Fp4)
COMPRESS_KEYS(fp8, Fp8)

// The ring alone, behind a launch that has read what it had.
extern "C" __global__ void __launch_bounds__(256) compress_keep(STEP, int ratio, int channels) {
  pdl_trigger();
  pdl_wait();
  const Step step{projected, stride, ape, slots, positions, rows, tokens, each, ring, length};
  const int first = blockIdx.x * each, lane = threadIdx.x % 32;
  const bool keeps = lane < min(each, tokens - first) && step.keeps(first + lane);
  for (u32 left = __ballot_sync(ALL_LANES, keeps); left; left &= left - 1)
    keep_terms(step, first + __ffs(left) - 1, ratio, channels);
}
