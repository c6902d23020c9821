// Vectors of a head: one warp each, whole warps alone leave early.
#pragma once
#include "common/reduce.cuh"

// [tokens, heads, n] with any strides of the first two: rows = tokens * heads.
template <class T>
struct Heads {
  const T* x;
  i64 token_stride, head_stride;
  int rows, heads, n;
};

// The vector of this warp.
struct HeadRow {
  int row, token, lane;
  i64 from;  // its first element in x
  bool live;

  template <class T>
  __device__ explicit HeadRow(const Heads<T>& all) {
    row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    live = row < all.rows;
    token = static_cast<u32>(row) / static_cast<u32>(all.heads);
    from = token * all.token_stride + (row - token * all.heads) * all.head_stride;
  }

  __device__ int column(int v) const { return v * WARP_COLUMNS + lane * EIGHT; }

  template <int V, class T>
  __device__ void load(Raw8<T> (&raw)[V], const Heads<T>& all) const {
    const bool wide = aligned(all.x + from, 0, 16);
#pragma unroll
    for (int i = 0; i < V; i++) raw[i] = load8(all.x + from + column(i), all.n - column(i), wide);
  }

  template <int V, class T>
  __device__ void load(float (&v)[V][8], const Heads<T>& all) const {
    Raw8<T> raw[V];
    load<V>(raw, all);
#pragma unroll
    for (int i = 0; i < V; i++) widen(raw[i], v[i]);
  }

  template <class T>
  __device__ void store(T* y, const float (&v)[8], int n, int i) const {
    T* const p = y + static_cast<i64>(row) * n;
    store8(p + column(i), v, n - column(i), aligned(p, 0, 16));
  }
};

// The sum of the squares of eight columns, each rounded to T.
template <class T>
__device__ __forceinline__ float rounded_squares(const float (&v)[8]) {
  float part = 0;
#pragma unroll
  for (int j = 0; j < 8; j++) part += rounded<T>(v[j] * v[j]);
  return part;
}

// What a vector of n numbers is multiplied by, of the sum of their squares: every step rounded to T.
template <class T>
__device__ __forceinline__ float unit_factor(float sum, int n, float eps) {
  const float mean = rounded<T>(sum / static_cast<float>(n));
  return rounded<T>(1.0f / sqrtf(rounded<T>(mean + eps)));
}

// Divide by the root of the mean square, rounded to T after every step as the reference does (`unit_rms`).
template <class T, int V>
__device__ __forceinline__ void unit_normalize(float (&v)[V][8], int n, float eps) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < V; i++) sum += warp_sum(rounded_squares<T>(v[i]));
  const float factor = unit_factor<T>(sum, n, eps);
#pragma unroll
  for (int i = 0; i < V; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) v[i][j] = rounded<T>(v[i][j] * factor);
}

// Cosines and signed sines of eight columns.
struct Angles {
  float c[8], s[8];
};

// The rotation of every token: rows of `dims` cosines and signed sines, FP32, contiguous.
struct Turn {
  const float* cos;
  const float* sin;
  int dims;
  bool inverse;

  // x turned by (c, s) with its partner, the other of its pair: each product and the sum rounded once.
  __device__ float one(float x, float partner, float c, float s) const {
    const float kept = x * c, crossed = partner * s;
    return inverse ? kept - crossed : kept + crossed;
  }

  // Of the eight columns from `at` on of a token's rotated part. at and dims: multiples of eight.
  __device__ Angles angles(int token, int at) const {
    const i64 from = static_cast<i64>(token) * dims + at;
    Angles found;
    load8_shared(found.c, cos + from, EIGHT, aligned(cos, 0, 16));
    load8_shared(found.s, sin + from, EIGHT, aligned(sin, 0, 16));
    return found;
  }

  // Turn these columns, rounded to T.
  template <class T>
  __device__ void eight(float (&v)[8], const Angles& by) const {
    float out[8];
#pragma unroll
    for (int j = 0; j < 8; j++) out[j] = rounded<T>(one(v[j], v[j ^ 1], by.c[j], by.s[j]));
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = out[j];
  }

  template <class T>
  __device__ void eight(float (&v)[8], int token, int at) const {
    eight<T>(v, angles(token, at));
  }
};
