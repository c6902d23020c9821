// From the partial sums of mhc_mix.cu to what a sublayer reads (mhc_pre, mhc_head), and on through its RMS norm and
// quantiser (mhc_pre_norm_quant, and the second kernel of mhc_post_pre_norm_quant).
//
// arch: sm_90a sm_100a sm_103a sm_120a
//
// Moves, one token, Flash: streams 32,768 bytes, partial sums 1,600, x and y 8,192 each, FP8 4,128. 8,192 tokens: 435
// MB; floor 130 us at 3.35 TB/s. One token is latency, in cycles after the wait: streams and partial sums from L2
// 300, sums over ranges 110, barrier 40, joint RMS 130, gates 170, x 130, its squares over the block 260, norm 130,
// amax 110, codes and stores 100: 1,480, 0.8 us. The Sinkhorn iteration (1,560 cycles, common/sinkhorn.cuh) starts
// beside the gates, in a warp of its own that passes no barrier behind, and ends about 800 cycles after the others:
// 2,300 cycles, 1.3 us in all. To make it shorter, comb would have to be finished by its reader, a sublayer later;
// then its 20 rounds would stand before the way back. base, scale and the norm's weight are fetched, and all
// addresses computed, before the wait.
//
// A block has 17 warps for Flash, 29 for Pro, and at most 64 registers a thread: two blocks of Flash fit into a
// multiprocessor, which have 64 KB of streams in flight. The numbers are those of mhc_pre and rms_norm_quant bit for
// bit.
//
// Measured on an H100: with the mix before it 5.3 us at one token of Flash (mhc_pre); 8,192 tokens in 465 us.
#include "common/mhc_finish.cuh"

#define KERNEL extern "C" __global__ void __launch_bounds__(mhc::FINISH_THREADS, 1)
#define SITE float norm_eps, const float *base, const float *scale, int m, int iterations, float eps
#define WAY_BACK float *post, float *comb
#define NEXT(T) const float *weight, T *y, u8 *data, u8 *block_scale, const float *total, float *own

#define PRE(name, T, M)                                                                                         \
  KERNEL name(const T* streams, const float* partial, T* x, int d, SITE, WAY_BACK) {                            \
    __shared__ mhc::Scratch<M> scratch;                                                                         \
    const mhc::Site site{base, scale, post, comb, m, iterations, eps};                                          \
    mhc::finish<T, M, mhc::Nothing, false>(streams, partial, site, norm_eps, x, d, {}, scratch);                \
  }

#define HEAD(name, T, M)                                                                                        \
  KERNEL name(const T* streams, const float* partial, T* x, int d, SITE) {                                      \
    __shared__ mhc::Scratch<M> scratch;                                                                         \
    const mhc::Site site{base, scale, nullptr, nullptr, m, iterations, eps};                                    \
    mhc::finish<T, M, mhc::Nothing, true>(streams, partial, site, norm_eps, x, d, {}, scratch);                 \
  }

#define PRE_NORM(name, T, M, Format)                                                                            \
  KERNEL name(const T* streams, const float* partial, T* x, int d, SITE, WAY_BACK, NEXT(T)) {                   \
    __shared__ mhc::Scratch<M> scratch;                                                                         \
    const mhc::Site site{base, scale, post, comb, m, iterations, eps};                                          \
    const mhc::Next<T> next{weight, norm_eps, y, data, block_scale, total, own};                                \
    mhc::finish<T, M, Format, false>(streams, partial, site, norm_eps, x, d, next, scratch);                    \
  }

#define QUANTISING(suffix, T)                      \
  PRE_NORM(mhc_pre_fp8_row_##suffix, T, 4, Fp8Row) \
  PRE_NORM(mhc_pre_mxfp4_##suffix, T, 4, Mxfp4<T>) \
  PRE_NORM(mhc_pre_nvfp4_##suffix, T, 4, Nvfp4)

PRE(mhc_pre_bf16, bf16, 4)
PRE(mhc_pre_float, float, 4)
PRE(mhc_pre_any_bf16, bf16, 0)
PRE(mhc_pre_any_float, float, 0)
HEAD(mhc_head_bf16, bf16, 4)
HEAD(mhc_head_float, float, 4)
HEAD(mhc_head_any_bf16, bf16, 0)
HEAD(mhc_head_any_float, float, 0)
QUANTISING(bf16, bf16)
QUANTISING(float, float)
