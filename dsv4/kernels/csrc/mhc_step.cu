// All that lies between two sublayers, for one token in one launch: the way back, the mix, Sinkhorn, the way in, RMS
// norm and quantiser (mhc_post_pre_norm_quant). One cluster of blocks a token; the same numbers as mhc_mix.cu's
// post_mix and mhc_finish.cu behind it, bit for bit, since all orders of sums are the same.
//
// arch: sm_90a sm_100a sm_103a sm_120a
//
// Moves, one token, Flash: fn 1,572,864 bytes, streams 2 x 32,768, y, x and the next y 8,192 each, FP8 4,128. A
// cluster of 16 fetches 98 KB of fn a block, into 64 registers a thread: at 64 bytes a cycle and multiprocessor 1,540
// cycles, 0.9 us. The fetch starts before the wait for the kernel in front; where that leaves no room on a whole
// GPC's multiprocessors (49,152 of 65,536 registers a block), it starts late and is the largest part of the step.
// After the wait, in cycles: addresses 30, y and streams from L2 300, way back and barrier 110, dot products 150,
// shuffles 130, sums to all blocks 300, sums over ranges 180, gates 300, x 60, shuffles 130, squares to all blocks
// 300, norm, amax, codes and stores 300: 2,300, 1.3 us. Sinkhorn runs beside it in a warp of block 0 that waits for
// nobody: done at 2,900, 1.65 us. The two kernels of mhc_mix.cu and mhc_finish.cu take 0.4 us and 1.3 us after their
// waits, and one launch more (0.8 us in a chain of dependent launches). So this one should be the faster for one
// token by 0.8 us if fn is fetched in time, and about equal if not. Pro has two ranges a block, the second fetched
// behind the first: 0.5 us more.
//
// Numbers go to other blocks by st.async, which counts bytes at an mbarrier of the receiver, and not by cluster
// barriers: a warp waits for the numbers that it reads, and the warp of Sinkhorn is waited for by nobody.
//
// Measured on an H100 (bench/mhc_forms.py): Flash 5.0 us at one token, against 5.6 as two kernels; 12.0 at eight,
// against 9.5. Pro 7.5 against 6.6 at one, 8.6 against 9.2 at four.
#include "common/mhc_step.cuh"

#define STEP(name, T, Format)                                                                                    \
  extern "C" __global__ void __launch_bounds__(mhc::STEP_BOUND, 1) name(                                         \
      const T* y_in, const T* before, const float* post_in, const float* comb_in, T* streams, const float* fn,   \
      T* x, int d, float norm_eps, const float* base, const float* scale, int iterations, float eps, float* post, \
      float* comb, const float* weight, T* y, u8* data, u8* block_scale, const float* total, float* own) {       \
    __shared__ mhc::StepScratch scratch;                                                                         \
    const mhc::Streams<T> in{streams, y_in, before, post_in, comb_in};                                           \
    const mhc::Site site{base, scale, post, comb, 4, iterations, eps};                                           \
    const mhc::Next<T> next{weight, norm_eps, y, data, block_scale, total, own};                                 \
    mhc::step<T, Format>(in, fn, site, norm_eps, x, d, next, scratch);                                           \
  }

STEP(mhc_step_fp8_row_bf16, bf16, Fp8Row)
STEP(mhc_step_mxfp4_bf16, bf16, Mxfp4<bf16>)
STEP(mhc_step_nvfp4_bf16, bf16, Nvfp4)
