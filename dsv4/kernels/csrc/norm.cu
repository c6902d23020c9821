// RMS norm of rows, alone and with the quantiser of the matrix behind it; RMS norm of query heads without weights.
//
// Moves   8,192 x 4096 BF16: reads 64 MiB, writes 64 MiB, with FP8 32 MiB and 0.25 MiB of scales more.
// Floor   at 3.0 TB/s: 45 us alone, 56 us with FP8, 50 us with FP4. One row: latency, about 2 us.
// Tried   one and two chunks a warp, 512 to 2,048 threads on a multiprocessor (bench/row_forms.py); next row early.
// Measured on an H100: 51 us alone, 64 with FP8, 59 with MXFP4; 83 with NVFP4 by row when its codes were made by
//         shifts and its scales by divisions with branches: 924 instructions a warp and turn, now 793; not measured since.
//         One row: 1.6, 1.8, 1.9 and 3.1 us.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/heads.cuh"
#include "common/rows.cuh"

// weight * (x * factor) rounded once to T, written to y and handed on as it was rounded.
template <class T, int V>
struct Normed {
  using Raw = Raw8<T>;
  const T* x;
  i64 stride;
  const float* weight;
  float eps;
  T* y;
  int n;
  float kept[8];

  __device__ void weights(float (&w)[8], int column) const {
    load8_shared(w, weight + column, n - column, aligned(weight, 0, 16));
  }

  // V = 1 is for few rows: the weights are there before the row is. V = 2 is for many: registers are dearer than reading
  // the weights from the first cache again.
  __device__ void constants(const Place& at) {
    if constexpr (V == 1) weights(kept, at.column(0));
  }

  __device__ void load(Raw (&raw)[V], const Place& at, int row) const {
    const bool wide = aligned(x, stride * static_cast<int>(sizeof(T)), 16);
    const T* const from = opaque(x + static_cast<i64>(row) * stride);
#pragma unroll
    for (int i = 0; i < V; i++) raw[i] = load8(from + at.column(i), n - at.column(i), wide);
  }

  __device__ void widened(float (&v)[V][8], const Raw (&raw)[V]) const {
#pragma unroll
    for (int i = 0; i < V; i++) widen(raw[i], v[i]);
  }

  __device__ void values(float (&v)[V][8], const Place& at, int row, bool live, float (&sums)[MOST_CHUNKS]) const {
    float part[V];
#pragma unroll
    for (int i = 0; i < V; i++) part[i] = square_sum(v[i]);
    const float factor = rms_factor(row_sum(part, at, sums), n, eps);
    const bool wide = aligned(y, static_cast<i64>(n) * static_cast<int>(sizeof(T)), 16);
#pragma unroll
    for (int i = 0; i < V; i++) {
      float w[8];
#pragma unroll
      for (int j = 0; j < 8; j++) w[j] = kept[j];
      if constexpr (V > 1) weights(w, at.column(i));
#pragma unroll
      for (int j = 0; j < 8; j++) v[i][j] = w[j] * (v[i][j] * factor);
      const Raw8<T> raw = rounded8<T>(v[i]);
      if (live) store8(y + static_cast<i64>(row) * n + at.column(i), raw, n - at.column(i), wide);
    }
  }
};

#define NORM(T, V, BOUNDS)                                                                                   \
  extern "C" __global__ void __launch_bounds__ BOUNDS rms_norm_##T##_##V(                                    \
      const T* x, i64 stride, const float* weight, float eps, T* y, int rows, int n, int slots, int warps) { \
    __shared__ Scratch scratch;                                                                              \
    run_rows<V>(Normed<T, V>{x, stride, weight, eps, y, n}, Kept{}, {rows, slots, warps}, scratch);          \
  }

#define NORM_QUANT(T, V, BOUNDS, format, Format)                                                                     \
  extern "C" __global__ void __launch_bounds__ BOUNDS rms_norm_##format##_##T##_##V(                                 \
      const T* x, i64 stride, const float* weight, float eps, T* y, int rows, int n, int slots, int warps, u8* data, \
      u8* scale, const float* total, float* own) {                                                                   \
    __shared__ Scratch scratch;                                                                                      \
    run_rows<V>(Normed<T, V>{x, stride, weight, eps, y, n}, Quantized<Format>{{data, scale, n}, total, own},         \
                {rows, slots, warps}, scratch);                                                                      \
  }

#define NORMS(T, V, BOUNDS)                 \
  NORM(T, V, BOUNDS)                        \
  NORM_QUANT(T, V, BOUNDS, fp8_row, Fp8Row) \
  NORM_QUANT(T, V, BOUNDS, mxfp4, Mxfp4<T>) \
  NORM_QUANT(T, V, BOUNDS, nvfp4, Nvfp4)

// Two blocks of 512 threads on a multiprocessor leave 64 registers each.
NORMS(bf16, 1, (1024))
NORMS(bf16, 2, (512, 2))
NORMS(float, 1, (1024))
NORMS(float, 2, (512, 1))
NORM(bf16, 4, (512, 1))
NORM(float, 4, (512, 1))

// One warp a head: x has rows of n at token * token_stride + head * head_stride, y is contiguous.
template <class T, int V>
__device__ __forceinline__ void unit_rms(const Heads<T>& heads, float eps, T* y) {
  pdl_trigger();
  pdl_wait();
  const HeadRow at(heads);
  if (!at.live) return;
  float v[V][8];
  at.load<V>(v, heads);
  unit_normalize<T, V>(v, heads.n, eps);
#pragma unroll
  for (int i = 0; i < V; i++) at.store(y, v[i], heads.n, i);
}

#define UNIT(T, V)                                                                                                     \
  extern "C" __global__ void __launch_bounds__(256)                                                                    \
      unit_rms_##T##_##V(const T* x, i64 token_stride, i64 head_stride, int rows, int heads, int n, float eps, T* y) { \
    unit_rms<T, V>({x, token_stride, head_stride, rows, heads, n}, eps, y);                                            \
  }

UNIT(bf16, 1)
UNIT(bf16, 2)
UNIT(float, 1)
UNIT(float, 2)
