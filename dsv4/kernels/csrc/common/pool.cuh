// Terms of a compressor: kept in rings, and pooled by a softmax in every channel over the tokens of a block.
//
// The order of the sums belongs to the block: whatever memory a term is read from, and whoever comes with it, the bits
// are the same. Eight rows at a time, of runs of 32 where there are more; in the eight ascending, each product fused
// with its sum; what came before is weighed down to the new maximum once for all eight; then the runs ascending.
#pragma once
#include "common/reduce.cuh"

// T tokens of a step, those of a sequence one after another. Terms are [2, channels]: values, then scores.
struct Step {
  const float* projected;
  i64 stride;
  const float* ape;  // [ratio, 2, channels]
  const i64 *slots, *positions, *rows;
  int tokens, each;  // each: of a block of threads, at most 32
  float* ring;
  int length;  // of the ring of one sequence

  // Whether the token `by` places from this one stands there, so many positions on. Both numbers are on their way
  // before one is looked at, here and below: a chain of them would take as long as the terms.
  __device__ bool has(int token, int by, i64 slot, i64 position) const {
    const int at = token + by, near = min(max(at, 0), tokens - 1);
    const i64 there = slots[near], then = positions[near];
    return (at == near) & (there == slot) & (then == position + by);
  }

  // Whether a block ends here that is stored.
  __device__ bool ends(int token, int ratio) const {
    const i64 slot = slots[token], position = positions[token], row = rows[token];
    return ((static_cast<u32>(position) + 1) % static_cast<u32>(ratio) == 0) & (slot >= 0) & (row >= 0);
  }

  // Whether its terms go to the ring: no later one takes their place.
  __device__ bool keeps(int token) const {
    const i64 slot = slots[token];
    return (slot >= 0) & !has(token, length, slot, positions[token]);
  }

  __device__ float* ring_row(i64 slot, i64 position, int width) const {
    return ring + (slot * length + static_cast<u32>(position) % static_cast<u32>(length)) * width;
  }
};

__device__ __forceinline__ void load4(float (&v)[4], const float* p) {
  const uint4 words = load16_once(p);
  v[0] = __uint_as_float(words.x), v[1] = __uint_as_float(words.y);
  v[2] = __uint_as_float(words.z), v[3] = __uint_as_float(words.w);
}

// Through the first cache: constants, and shared memory.
__device__ __forceinline__ void load4_shared(float (&v)[4], const float* p) {
  const float4 found = *reinterpret_cast<const float4*>(p);
  v[0] = found.x, v[1] = found.y, v[2] = found.z, v[3] = found.w;
}

__device__ __forceinline__ void store4(float* p, const float (&v)[4]) {
  float4 words;
  words.x = v[0], words.y = v[1], words.z = v[2], words.w = v[3];
  *reinterpret_cast<float4*>(p) = words;
}

// The terms of a token into the ring.
__device__ __forceinline__ void keep_terms(const Step& step, int token, int ratio, int channels) {
  const i64 slot = step.slots[token], position = step.positions[token];
  const float* const from = step.projected + token * step.stride;
  const float* const bias = step.ape + static_cast<u32>(position) % static_cast<u32>(ratio) * 2 * channels;
  float* const to = step.ring_row(slot, position, 2 * channels);
  constexpr int N = 4;  // of them are on their way before the first is stored
  const int apart = blockDim.x * 4;
#pragma unroll 1
  for (int first = threadIdx.x * 4; first < 2 * channels; first += N * apart) {
    float v[N][4], b[N][4];
#pragma unroll
    for (int k = 0; k < N; k++)
      if (const int at = first + k * apart; at < 2 * channels) load4(v[k], from + at), load4_shared(b[k], bias + at);
#pragma unroll
    for (int k = 0; k < N; k++) {
      if (first + k * apart >= 2 * channels) break;
#pragma unroll
      for (int c = 0; c < 4; c++) v[k][c] += b[k][c];  // zeros of the values
      store4(to + first + k * apart, v[k]);
    }
  }
}

// Blocks of RATIO tokens pooled into DIMS channels: four channels a thread, SPAN rows in RUNS runs. A block of four
// reads the first half of the channels of the block before it, and the second half of its own.
template <int RATIO_, int DIMS_>
struct Blocks {
  static constexpr int RATIO = RATIO_, DIMS = DIMS_;
  static constexpr bool OVERLAPPED = RATIO == 4;
  static constexpr int CHANNELS = OVERLAPPED ? 2 * DIMS : DIMS, WIDTH = 2 * CHANNELS;
  static constexpr int SPAN = OVERLAPPED ? 2 * RATIO : RATIO, TOGETHER = 8;
  static constexpr int RUNS = OVERLAPPED ? 1 : 4, ROWS = SPAN / RUNS;
  static constexpr int LANES = DIMS / 4, THREADS = LANES * RUNS;

  // Of a row of the span: where its channels begin in a term, and its place in its own block.
  __device__ static constexpr int half(int row) { return OVERLAPPED && row >= RATIO ? DIMS : 0; }
  __device__ static constexpr int inside(int row) { return row % RATIO; }
};

constexpr u32 NO_SCORE = SIGN | INFINITY_BITS;

// What a run has come to in four channels.
struct Pooled {
  float top[4], sum[4], value[4];

  __device__ Pooled() {
#pragma unroll
    for (int c = 0; c < 4; c++) top[c] = __uint_as_float(NO_SCORE), sum[c] = value[c] = 0;
  }

  // Minus infinity less itself would be NaN. NaN itself never becomes the maximum, and comes to the sum by its own row.
  __device__ static float base(float top) { return top == __uint_as_float(NO_SCORE) ? 0.0f : top; }

  template <int N>
  __device__ void add(const float (&v)[N][4], const float (&s)[N][4]) {
#pragma unroll
    for (int c = 0; c < 4; c++) {
      float most = top[c];
#pragma unroll
      for (int k = 0; k < N; k++) most = fmaxf(most, s[k][c]);
      const float from = base(most), kept = expf(top[c] - from);
      top[c] = most, sum[c] *= kept, value[c] *= kept;
#pragma unroll
      for (int k = 0; k < N; k++) {
        const float weight = expf(s[k][c] - from);
        sum[c] += weight;
        value[c] = fmaf(weight, v[k][c], value[c]);
      }
    }
  }
};

// Where the rows of a run lie in memory: lane k of every warp knows that of row k, masks tell what they are.
struct Sources {
  u64 mine;
  u32 here, absent;  // of this step; before the sequence

  template <class B>
  __device__ static Sources of(const Step& step, int token, i64 slot, i64 position, int run) {
    const int lane = threadIdx.x % 32, row = run * B::ROWS + (lane < B::ROWS ? lane : B::ROWS - 1);
    const int back = row - (B::SPAN - 1);
    const bool none = position + back < 0, inside = step.has(token, back, slot, position);
    // What does not exist is read from where something is, and not looked at.
    const float* from = step.projected + (inside ? token + back : token) * step.stride;
    if (!inside && !none) from = step.ring_row(slot, position + back, B::WIDTH);
    return {reinterpret_cast<u64>(from), __ballot_sync(ALL_LANES, inside), __ballot_sync(ALL_LANES, none)};
  }

  __device__ const float* row(int k) const { return reinterpret_cast<const float*>(__shfl_sync(ALL_LANES, mine, k)); }
};

// One run of the block that ends with this token, in the four channels from `channel` on.
template <class B>
__device__ __forceinline__ Pooled pool_run(const Step& step, int token, i64 slot, i64 position, int run, int channel) {
  constexpr int N = B::TOGETHER;
  const Sources from = Sources::of<B>(step, token, slot, position, run);
  Pooled pooled;
#pragma unroll 1
  for (int first = 0; first < B::ROWS; first += N) {
    float v[N][4], s[N][4];
#pragma unroll
    for (int k = 0; k < N; k++) {
      const float* const p = from.row(first + k) + B::half(k) + channel;
      load4(v[k], p);
      load4(s[k], p + B::CHANNELS);
    }
    const u32 here = from.here >> first, absent = from.absent >> first;
    if (here & ((1 << N) - 1)) {  // of the whole warp; what comes from the ring has its bias already
#pragma unroll
      for (int k = 0; k < N; k++) {
        const int inside = B::inside(run * B::ROWS + first + k);
        float bias[4];
        load4_shared(bias, step.ape + (2 * inside + 1) * B::CHANNELS + B::half(k) + channel);
#pragma unroll
        for (int c = 0; c < 4; c++) s[k][c] = here >> k & 1 ? s[k][c] + bias[c] : s[k][c];
      }
    }
#pragma unroll
    for (int k = 0; k < N; k++)
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const bool none = absent >> k & 1;
        s[k][c] = none ? __uint_as_float(NO_SCORE) : s[k][c], v[k][c] = none ? 0.0f : v[k][c] + 0.0f;
      }
    pooled.add(v, s);
  }
  return pooled;
}

// What the runs have come to, in the first one's threads: `parts` [RUNS - 1][3][DIMS]. All threads call it.
template <class B>
__device__ __forceinline__ void merge_runs(Pooled& pooled, int run, int channel, float* parts) {
  if constexpr (B::RUNS > 1) {
    float* const own = parts + (run - 1) * 3 * B::DIMS + channel;
    if (run > 0) store4(own, pooled.top), store4(own + B::DIMS, pooled.sum), store4(own + 2 * B::DIMS, pooled.value);
    __syncthreads();
    if (run > 0) return;
    float top[B::RUNS - 1][4], most[4];
#pragma unroll
    for (int c = 0; c < 4; c++) most[c] = pooled.top[c];
#pragma unroll
    for (int r = 0; r < B::RUNS - 1; r++) {
      load4_shared(top[r], parts + r * 3 * B::DIMS + channel);
#pragma unroll
      for (int c = 0; c < 4; c++) most[c] = fmaxf(most[c], top[r][c]);
    }
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const float kept = expf(pooled.top[c] - Pooled::base(most[c]));
      pooled.sum[c] *= kept, pooled.value[c] *= kept;
    }
#pragma unroll
    for (int r = 0; r < B::RUNS - 1; r++) {
      float sum[4], value[4];
      load4_shared(sum, parts + (r * 3 + 1) * B::DIMS + channel);
      load4_shared(value, parts + (r * 3 + 2) * B::DIMS + channel);
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const float kept = expf(top[r][c] - Pooled::base(most[c]));
        pooled.sum[c] = fmaf(sum[c], kept, pooled.sum[c]), pooled.value[c] = fmaf(value[c], kept, pooled.value[c]);
      }
    }
  }
}
