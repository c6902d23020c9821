// Rows as a quantised matrix reads them: FP8 per 128, MXFP4 per 32, NVFP4 per 16, from BF16 or FP32.
//
// Moves   8,192 x 4096 BF16 to FP8: reads 64 MiB, writes 32.25 MiB.
// Floor   at 3.0 TB/s: 34 us to FP8, 28 us to FP4.
// Tried   as norm.cu.
// Measured on an H100: 37 us to FP8, 29 to MXFP4, 53 to NVFP4 by row, which was bound by instructions (see norm.cu).
//
// NVFP4 under the whole batch's own scale takes three kernels: the tops of the rows, the scale, the bytes.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/rows.cuh"

template <class T, int V>
struct Plain {
  using Raw = Raw8<T>;
  const T* x;
  i64 stride;
  int n;

  __device__ void constants(const Place&) {}

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

  __device__ void values(float (&)[V][8], const Place&, int, bool, float (&)[MOST_CHUNKS]) const {}
};

// The largest magnitude of every row, blocks of NVFP4 that cannot be stored left out, as bits.
struct Tops {
  u32* top;

  __device__ void begin() {}
  template <int V>
  __device__ void write(const float (&v)[V][8], const Place& at, int row, bool live, u32 (&tops)[32]) const {
    u32 own = 0;
#pragma unroll
    for (int i = 0; i < V; i++) own = max(own, Nvfp4::counted(Nvfp4::block_max(v[i])));
    own = row_max(own, at, tops);
    if (live && at.warp == 0 && at.lane == 0) top[row] = own;
  }
};

#define QUANTIZE(T, V, THREADS, format, Format)                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                           \
      quantize_##format##_##T##_##V(const T* x, i64 stride, int rows, int n, int slots, int warps, u8* data,      \
                                    u8* scale, const float* total, float* own) {                                  \
    __shared__ Scratch scratch;                                                                                   \
    run_rows<V>(Plain<T, V>{x, stride, n}, Quantized<Format>{{data, scale, n}, total, own}, {rows, slots, warps}, \
                scratch);                                                                                         \
  }

#define QUANTIZES(T, V, THREADS)                                                                    \
  QUANTIZE(T, V, THREADS, fp8_row, Fp8Row)                                                          \
  QUANTIZE(T, V, THREADS, mxfp4, Mxfp4<T>)                                                          \
  QUANTIZE(T, V, THREADS, nvfp4, Nvfp4)                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS)                                             \
      row_tops_##T##_##V(const T* x, i64 stride, int rows, int n, int slots, int warps, u32* top) { \
    __shared__ Scratch scratch;                                                                     \
    run_rows<V>(Plain<T, V>{x, stride, n}, Tops{top}, {rows, slots, warps}, scratch);               \
  }

QUANTIZES(bf16, 1, 1024)
QUANTIZES(bf16, 2, 1024)
QUANTIZES(float, 1, 1024)

// One block: NVFP4's global scale of the largest of `rows` tops; 1 for none.
extern "C" __global__ void __launch_bounds__(1024) whole_scale(const u32* top, int rows, float* total) {
  __shared__ u32 tops[32];
  pdl_trigger();
  pdl_wait();
  u32 own = 0;
  for (int row = threadIdx.x; row < rows; row += blockDim.x) own = max(own, top[row]);
  own = row_max(own, Place({rows, 1, static_cast<int>(blockDim.x / 32)}), tops);
  if (threadIdx.x == 0) *total = nvfp4_global(own);
}
