// SwiGLU with its clamp, alone and with the routing weight and the quantiser of the matrix behind it.
//
// Moves   8,192 x 2048 BF16 to FP8: reads 64 MiB, writes 16.1 MiB.
// Floor   at 3.0 TB/s: 28 us to FP8, 25 us to FP4.
// Tried   as norm.cu. With IEEE division in place of the reciprocal: 39 us to FP8.
// Measured on an H100: 30 us to FP8, 34 to MXFP4, 44 to NVFP4 by row, which is bound by instructions: 534 a warp and
//         chunk then; 479 now, 425 of two chunks a turn; not measured since.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/rows.cuh"
#include "common/swiglu.cuh"

// ROUNDED: to T, after the row's weight if there is one.
template <class T, int V, bool ROUNDED>
struct Gated {
  struct Raw {
    Raw8<T> gate, up;
  };
  const T* gate;
  const T* up;
  i64 gate_stride, up_stride;
  float limit;
  const float* weight;
  int n;

  // Where the lane begins: not computed again for every row.
  const T* gates;
  const T* ups;
  bool whole[V];  // a chunk's eight columns are all there, and can be loaded at once

  __device__ void constants(const Place& at) {
    constexpr int BYTES = sizeof(T);
    gates = opaque(gate + at.column(0)), ups = opaque(up + at.column(0));
    const bool wide = aligned(gate, gate_stride * BYTES, 16) && aligned(up, up_stride * BYTES, 16);
#pragma unroll
    for (int i = 0; i < V; i++) whole[i] = wide && at.column(i) + EIGHT <= n;
  }

  __device__ void load(Raw (&raw)[V], const Place& at, int row) const {
    const u64 token = static_cast<u32>(row);
    const T* const from = gates + token * static_cast<u64>(gate_stride);
    const T* const with = ups + token * static_cast<u64>(up_stride);
#pragma unroll
    for (int i = 0; i < V; i++) {
      const int further = at.column(i) - at.column(0);
      if (whole[i]) {
        load_whole(raw[i].gate, from + further), load_whole(raw[i].up, with + further);
      } else {
        load_part(raw[i].gate, from + further, n - at.column(i));
        load_part(raw[i].up, with + further, n - at.column(i));
      }
    }
  }

  __device__ void widened(float (&v)[V][8], const Raw (&raw)[V]) const {
#pragma unroll
    for (int i = 0; i < V; i++) {
      float g[8], u[8];
      widen(raw[i].gate, g);
      widen(raw[i].up, u);
#pragma unroll
      for (int j = 0; j < 8; j++) v[i][j] = swiglu(g[j], u[j], limit);
    }
  }

  __device__ void values(float (&v)[V][8], const Place&, int row, bool live, float (&)[MOST_CHUNKS]) const {
    if (!ROUNDED) return;
    const float w = weight && live ? weight[row] : 1.0f;  // a product with 1 changes nothing
#pragma unroll
    for (int i = 0; i < V; i++) {
#pragma unroll
      for (int j = 0; j < 8; j++) v[i][j] *= w;
      rounded8<T>(v[i]);
    }
  }
};

#define SWIGLU_QUANT(T, V, BOUNDS, format, Format)                                                                   \
  extern "C" __global__ void __launch_bounds__ BOUNDS swiglu_##format##_##T##_##V(                                   \
      const T* gate, const T* up, i64 gate_stride, i64 up_stride, float limit, const float* weight, int rows, int n, \
      int slots, int warps, u8* data, u8* scale, const float* total, float* own) {                                   \
    __shared__ Scratch scratch;                                                                                      \
    run_rows<V>(Gated<T, V, true>{gate, up, gate_stride, up_stride, limit, weight, n},                               \
                Quantized<Format>{{data, scale, n}, total, own}, {rows, slots, warps}, scratch);                     \
  }

#define SWIGLUS(T, V, BOUNDS)                                                                                    \
  SWIGLU_QUANT(T, V, BOUNDS, fp8_row, Fp8Row)                                                                    \
  SWIGLU_QUANT(T, V, BOUNDS, mxfp4, Mxfp4<T>)                                                                    \
  SWIGLU_QUANT(T, V, (1024), nvfp4, Nvfp4)                                                                       \
  extern "C" __global__ void __launch_bounds__(1024)                                                             \
      swiglu_##T##_##V(const T* gate, const T* up, i64 gate_stride, i64 up_stride, float limit, int rows, int n, \
                       int slots, int warps, float* y) {                                                         \
    __shared__ Scratch scratch;                                                                                  \
    run_rows<V>(Gated<T, V, false>{gate, up, gate_stride, up_stride, limit, nullptr, n}, Dense<float>{y, n},     \
                {rows, slots, warps}, scratch);                                                                  \
  }                                                                                                              \
  extern "C" __global__ void __launch_bounds__(1024)                                                             \
      swiglu_weighed_##T##_##V(const T* gate, const T* up, i64 gate_stride, i64 up_stride, float limit,          \
                               const float* weight, int rows, int n, int slots, int warps, T* y) {               \
    __shared__ Scratch scratch;                                                                                  \
    run_rows<V>(Gated<T, V, true>{gate, up, gate_stride, up_stride, limit, weight, n}, Dense<T>{y, n},           \
                {rows, slots, warps}, scratch);                                                                  \
  }

// One chunk a warp: two inputs, and the next row's beside them, keep enough bytes on the way. To FP8 and MXFP4, 2,048
// threads of 32 registers on a multiprocessor are the fastest; those with sm_120 hold 1,536 at most.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1200
#define MANY (1024, 2)
#else
#define MANY (1024)
#endif
SWIGLUS(bf16, 1, MANY)
SWIGLUS(float, 1, (1024))

// NVFP4 is bound by instructions: of two chunks a turn what is done once a row is half of it.
SWIGLU_QUANT(bf16, 2, (512, 2), nvfp4, Nvfp4)
