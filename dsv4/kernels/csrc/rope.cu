// Rotary embedding of the last dimensions, forth and back, and the norm of query heads in front of it.
//
// Moves   8,192 tokens x 64 heads x 512 BF16: reads and writes 512 MiB each. One Flash token: 64 KiB each.
// Floor   at 3.0 TB/s: 358 us. One token: latency, about 2 us.
// Tried   one warp a head, 512 columns at a time, 8 heads a block.
// Measured on an H100: 364 us, with the norm 368 (a copy takes 362); one token 1.4, with the norm 1.7.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/heads.cuh"

// Column by column: where a vector of eight lies across the beginning of the rotated part, or is not aligned.
template <class T>
__device__ __forceinline__ void rope_part(const T* x, T* y, const Turn& turn, int token, int column, int n) {
  const int first = n - turn.dims;
  const i64 from = static_cast<i64>(token) * turn.dims - first;
#pragma unroll 1
  for (int e = column; e < n && e < column + EIGHT; e++) {
    if (e < first) {
      y[e] = x[e];
    } else {
      const float partner = to_float(x[first + ((e - first) ^ 1)]);
      y[e] = narrow<T>(turn.one(to_float(x[e]), partner, turn.cos[from + e], turn.sin[from + e]));
    }
  }
}

// Any n and any even dims <= n. What is in front of the rotated part is copied as it is.
template <class T>
__device__ __forceinline__ void rope(const Heads<T>& heads, const Turn& turn, T* y) {
  constexpr int V = 2;
  pdl_trigger();
  pdl_wait();
  const HeadRow at(heads);
  if (!at.live) return;
  const int n = heads.n, first = n - turn.dims;
  const T* const x = heads.x + at.from;
  T* const out = y + static_cast<i64>(at.row) * n;
  const bool whole = (n | first) % EIGHT == 0 && aligned(x, 0, 16) && aligned(out, 0, 16);
  for (int start = at.lane * EIGHT; start < n; start += V * WARP_COLUMNS) {
    Raw8<T> raw[V];
#pragma unroll
    for (int i = 0; i < V; i++)
      if (whole && start + i * WARP_COLUMNS < n) load_whole(raw[i], x + start + i * WARP_COLUMNS);
#pragma unroll
    for (int i = 0; i < V; i++) {
      const int column = start + i * WARP_COLUMNS;
      if (column >= n) break;
      if (!whole) {
        rope_part(x, out, turn, at.token, column, n);
        continue;
      }
      if (column >= first) {
        float v[8];
        widen(raw[i], v);
        turn.eight<T>(v, at.token, column - first);
        pack(raw[i], v);
      }
      store_whole(out + column, raw[i]);
    }
  }
}

#define ROPE(T)                                                                                             \
  extern "C" __global__ void __launch_bounds__(256)                                                         \
      rope_##T(const T* x, i64 token_stride, i64 head_stride, int rows, int heads, int n, const float* cos, \
               const float* sin, int dims, int inverse, T* y) {                                             \
    rope<T>({x, token_stride, head_stride, rows, heads, n}, {cos, sin, dims, inverse != 0}, y);             \
  }

ROPE(bf16)
ROPE(float)

// Heads divided by their root mean square, then rotated; rounded to T between the two as the ops are. n and dims are
// multiples of eight.
template <class T, int V>
__device__ __forceinline__ void q_norm_rope(const Heads<T>& heads, float eps, const Turn& turn, T* y) {
  pdl_trigger();
  pdl_wait();
  const HeadRow at(heads);
  if (!at.live) return;
  float v[V][8];
  at.load<V>(v, heads);
  unit_normalize<T, V>(v, heads.n, eps);
  const int first = heads.n - turn.dims;
#pragma unroll
  for (int i = 0; i < V; i++) {
    if (at.column(i) >= first && at.column(i) < heads.n) turn.eight<T>(v[i], at.token, at.column(i) - first);
    at.store(y, v[i], heads.n, i);
  }
}

#define Q_NORM_ROPE(T, V)                                                                                         \
  extern "C" __global__ void __launch_bounds__(256)                                                               \
      q_norm_rope_##T##_##V(const T* x, i64 token_stride, i64 head_stride, int rows, int heads, int n, float eps, \
                            const float* cos, const float* sin, int dims, T* y) {                                 \
    q_norm_rope<T, V>({x, token_stride, head_stride, rows, heads, n}, eps, {cos, sin, dims, false}, y);           \
  }

Q_NORM_ROPE(bf16, 1)
Q_NORM_ROPE(bf16, 2)
Q_NORM_ROPE(float, 1)
Q_NORM_ROPE(float, 2)
