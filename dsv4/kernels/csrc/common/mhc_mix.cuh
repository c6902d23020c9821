// The bodies of mhc_mix.cu's kernels.
#pragma once
#include "common/copy.cuh"
#include "common/mhc.cuh"

namespace mhc {

// Where a mix finds its streams [T, M, d]. POST: it makes them first, of y [T, d], the streams before [T, M, d],
// post [T, M] and comb [T, M, M].
template <class T>
struct Streams {
  T* streams;
  const T* y = nullptr;
  const T* before = nullptr;
  const float* post = nullptr;
  const float* comb = nullptr;
};

// A lane's part of ROWS rows of fn from `row` on, over one range: four columns of each half of each stream, zeros past
// the last column. Four streams.
template <int ROWS>
struct Weights {
  float4 at[ROWS][8];

  __device__ __forceinline__ void load(const float* fn, int row, int range, int d) {
    const int column = range * RANGE + threadIdx.x % 32 * 4;
    const bool there[2] = {column < d, column + 128 < d};
    const float* const from = fn + (i64)row * 4 * d + column;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        at[r][i] = make_float4(0, 0, 0, 0);
        if (there[i / 4]) at[r][i] = load_quad(from + (r * 4 + i % 4) * d + i / 4 * 128);
      }
    }
  }
};

constexpr int FEW_WARPS = 4;
constexpr int FEW_THREADS = 32 * FEW_WARPS;

// A thread's share of the way back: four columns, and two of the four streams, from token to token. Of 128 threads the
// first 64 make streams 0 and 1, the others 2 and 3.
template <class T>
struct Share {
  Streams<T> at;
  int quad, first;
  bool there;

  __device__ Share(const Streams<T>& in, i64 token, int d, int range) : at(in) {
    quad = threadIdx.x % QUADS, first = threadIdx.x / QUADS * 2;
    there = range * RANGE + 4 * quad < d;
    const int column = there ? range * RANGE + 4 * quad : 0;  // what is read there is thrown away
    at.y += column, at.before += column, at.streams += (i64)first * d + column, at.post += first, at.comb += first;
    skip(token, d);
  }

  __device__ void prefetch() const {
    prefetch_line(at.y), prefetch_line(at.before), prefetch_line(at.streams), prefetch_line(at.post);
    prefetch_line(at.comb);
  }

  __device__ void skip(i64 tokens, int d) {
    const i64 columns = tokens * d;
    at.y += columns, at.before += 4 * columns, at.streams += 4 * columns, at.post += 4 * tokens, at.comb += 16 * tokens;
  }

  // One token: into shared memory, x[stream * QUADS + quad], widened again, zeros past the last column; and stream
  // number `only` to memory, or all of them where that is negative. All loads come first: one trip to L2.
  __device__ void stage(float4* x, int d, int only) const {
    const float4 own = load_quad(at.y);
    const float2 to = load_pair(at.post);
    float4 old[4];
    float2 by[4];
#pragma unroll
    for (int j = 0; j < 4; j++) old[j] = load_quad(at.before + (i64)j * d), by[j] = load_pair(at.comb + 4 * j);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const auto weight = [&](int j) { return i ? by[j].y : by[j].x; };
      float4 v = written_back(own, i ? to.y : to.x, 4, weight, [&](int j) { return old[j]; });
      v = there ? rounded_quad<T>(v) : make_float4(0, 0, 0, 0);
      x[(first + i) * QUADS + quad] = v;
      if (there && (only < 0 || only == first + i)) store_quad(at.streams + (i64)i * d, v);
    }
  }
};

// The same without a way back, of any number of streams.
template <class T>
__device__ __forceinline__ void stage(const T* streams, i64 token, int d, int m, int range, float4* x) {
  const int quad = threadIdx.x % QUADS, column = range * RANGE + 4 * quad;
  const T* const from = streams + token * m * d + column;
#pragma unroll
  for (int i = 0; i < (m + 1) / 2; i++) {
    const int k = 2 * i + threadIdx.x / QUADS;
    if (k < m) x[k * QUADS + quad] = column < d ? load_quad(from + (i64)k * d) : make_float4(0, 0, 0, 0);
  }
}

// A warp has one row of fn, a block FEW_WARPS of them and one range. M = 0: any number of streams up to MOST, and fn is
// read where it is used. Blocks: parts of FEW_WARPS rows, then ranges, then groups, whose tokens are `groups` apart.
// POST, for 24 rows: every block of a range computes the way back, and the first four parts write a stream each.
template <class T, int M, bool POST>
__device__ __forceinline__ void few(const Streams<T>& in, const float* fn, float* partial, int tokens, int d, int n,
                                    int m, int groups, float4 (&x)[2][(M ? M : MOST) * QUADS]) {
  pdl_trigger();
  const int ranges = ranges_of(d), parts = POST ? 24 / FEW_WARPS : (n + FEW_WARPS - 1) / FEW_WARPS;
  const int part = blockIdx.x % parts;
  int range = blockIdx.x / parts, group = 0;
  while (range >= ranges) range -= ranges, group++;  // no round for one token, where a division would be waited for
  const int lane = threadIdx.x % 32, row = part * FEW_WARPS + threadIdx.x / 32;
  const int first = range * RANGE + 4 * lane;
  const int least = row < n ? row : 0;
  const auto weight = [&](int half, int j) {
    const int column = first + half * 128;
    return column < d ? load_quad(fn + ((i64)least * m + j) * d + column) : make_float4(0, 0, 0, 0);
  };
  Weights<1> held;
  if constexpr (M > 0) held.load(fn, least, range, d);
  float* to = partial + ((i64)group * ranges + range) * (n + 1);
  Share<T> share(in, group, d, range);
  prefetch_line(to);
  if (POST) share.prefetch();
  pdl_wait();
  int turn = 0;
  for (i64 token = group; token < tokens; token += groups, turn ^= 1) {
    if constexpr (POST) {
      share.stage(x[turn], d, part);
      share.skip(groups, d);
    } else {
      stage(in.streams, token, d, m, range, x[turn]);
    }
    __syncthreads();  // the only one a token: behind it, what the next token overwrites has been read
    float sum = 0, squares = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int j = 0; j < m; j++) {
        const float4 v = x[turn][j * QUADS + half * 32 + lane];
        sum = dot(v, M ? held.at[0][M ? half * 4 + j : 0] : weight(half, j), sum);
        squares = dot(v, v, squares);
      }
    }
    sum = warp_sum(sum), squares = warp_sum(squares);
    if (lane == 0 && row < n) to[row] = sum;
    if (lane == 0 && row == 0) to[n] = squares;
    to += (i64)groups * ranges * (n + 1);
  }
}

constexpr int MANY_WARPS = 6, MANY_ROWS = 4;  // 24 rows of fn: M = 4 alone
constexpr int MANY_THREADS = 32 * MANY_WARPS;

// Some tokens of one range. With POST: the streams before, which become the new ones, y, and comb [4, 4] before post
// [4].
template <class T, bool POST>
struct Tile {
  static constexpr int TOKENS = 12 / sizeof(T), ROWS = POST ? 5 : 4;
  static constexpr int VALUES = 16 / sizeof(T), PIECES = RANGE / VALUES;  // of one copy; of a row
  alignas(16) T rows[TOKENS][ROWS][RANGE];
  alignas(16) float gates[TOKENS][20];

  __device__ void fetch(const Streams<T>& in, int first, int tokens, int d, int range) {
#pragma unroll 1
    for (int i = threadIdx.x; i < TOKENS * ROWS * PIECES; i += MANY_THREADS) {
      const int t = i / (ROWS * PIECES), row = i / PIECES % ROWS, at = i % PIECES * VALUES;
      const int column = range * RANGE + at;
      const i64 token = first + t;
      const T* from = (POST ? in.before : in.streams) + (token * 4 + row) * d + column;
      if (row == 4) from = in.y + token * d + column;
      if (token < tokens && column < d) {
        copy16_async(&rows[t][row][at], from);
      } else {
        *reinterpret_cast<uint4*>(&rows[t][row][at]) = make_uint4(0, 0, 0, 0);
      }
    }
    if constexpr (POST) {
      for (int i = threadIdx.x; i < TOKENS * 5; i += MANY_THREADS) {
        const int t = i / 5, piece = i % 5;
        const i64 token = first + t;
        const float* const from = piece < 4 ? in.comb + token * 16 + 4 * piece : in.post + token * 4;
        if (token < tokens) copy16_async(&gates[t][4 * piece], from);
      }
    }
  }

  // The way back, in place and to memory, two columns at a time: there are few registers left. What a thread overwrites
  // it alone has read.
  __device__ void write_back(const Streams<T>& in, int first, int tokens, int d, int range) {
#pragma unroll 1
    for (int i = threadIdx.x; i < TOKENS * RANGE / 2; i += MANY_THREADS) {
      const int t = i / (RANGE / 2), at = i % (RANGE / 2) * 2, column = range * RANGE + at;
      const i64 token = first + t;
      if (token >= tokens || column >= d) continue;
      const float2 y = load_pair(&rows[t][ROWS - 1][at]);
      float2 old[4];
#pragma unroll
      for (int j = 0; j < 4; j++) old[j] = load_pair(&rows[t][j][at]);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const float2 v = written_back(y, gates[t][16 + k], 4, [&](int j) { return gates[t][4 * j + k]; },
                                      [&](int j) { return old[j]; });
        store_pair(&rows[t][k][at], v);
        store_pair(in.streams + (token * 4 + k) * d + column, v);
      }
    }
  }
};

// A block has one range and all rows of fn, a warp four of these in registers. Blocks: ranges, then groups, whose tiles
// are `groups` apart. The next tile is fetched while this one is used.
template <class T, bool POST>
__device__ __forceinline__ void many(const Streams<T>& in, const float* fn, float* partial, int tokens, int d,
                                     int groups, Tile<T, POST> (&tiles)[2]) {
  constexpr int N = MANY_WARPS * MANY_ROWS, TOKENS = Tile<T, POST>::TOKENS;
  pdl_trigger();
  const int ranges = ranges_of(d), range = blockIdx.x % ranges;
  const int group = blockIdx.x / ranges, stride = groups * TOKENS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Weights<MANY_ROWS> held;
  held.load(fn, warp * MANY_ROWS, range, d);
  pdl_wait();
  tiles[0].fetch(in, group * TOKENS, tokens, d, range);
  int turn = 0;
  for (int first = group * TOKENS; first < tokens; first += stride, turn ^= 1) {
    Tile<T, POST>& tile = tiles[turn];
    copies_done();
    __syncthreads();
    if (first + stride < tokens) tiles[turn ^ 1].fetch(in, first + stride, tokens, d, range);
    if constexpr (POST) {
      tile.write_back(in, first, tokens, d, range);
      __syncthreads();
    }
    const int count = min(TOKENS, tokens - first);
#pragma unroll 1
    for (int t = 0; t < count; t++) {
      float sum[MANY_ROWS] = {}, squares = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float4 v = load_quad(&tile.rows[t][i % 4][i / 4 * 128 + 4 * lane]);
#pragma unroll
        for (int r = 0; r < MANY_ROWS; r++) sum[r] = dot(v, held.at[r][i], sum[r]);
      }
      float* const to = partial + ((i64)(first + t) * ranges + range) * (N + 1);
      const float found = sum_lanes_4(sum);
      if (lane % 8 == 0) to[warp * MANY_ROWS + lane / 8] = found;
      if ((first + t) % MANY_WARPS != warp) continue;  // the sum of squares, in turn
#pragma unroll 1
      for (int i = 0; i < 8; i++) {
        const float4 v = load_quad(&tile.rows[t][i % 4][i / 4 * 128 + 4 * lane]);
        squares = dot(v, v, squares);
      }
      squares = warp_sum(squares);
      if (lane == 0) to[N] = squares;
    }
  }
}

}  // namespace mhc
