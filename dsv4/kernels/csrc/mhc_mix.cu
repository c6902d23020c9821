// The mix of mHC: for every token the n dot products of its M streams with the rows of fn, and their sum of squares,
// as partial sums over ranges of 256 columns (common/mhc.cuh has the order). `post_mix` writes the streams first,
// from a sublayer's output and the streams that it started from, and mixes what it wrote. mhc_finish.cu goes on from
// there.
//
// arch: sm_90a sm_100a sm_103a sm_120a
//
// Moves, one token, Flash (M 4, d 4096, n 24): fn 1,572,864 bytes; y 8,192, streams 2 x 32,768, partial sums 1,600.
// Floor: 0.47 us of an H100's 3.35 TB/s, 0.33 us of an H200's 4.8. Arithmetic: 0.4 M FMAs, nothing.
// 8,192 tokens: 268 MB of streams (post_mix: 604 MB): 80 us (180 us) at 3.35 TB/s; 3.36 G FMAs: 109 us at 132 SMs x 128
// x 1.755 GHz. So the mix is bound by FMAs there, post_mix by memory.
//
// few: one warp a row of fn, four to a block; a block has one range and four rows: 96 blocks for Flash, 168 for Pro,
// so that each multiprocessor fetches 16 KB of fn, 0.15 us at the 64 bytes a cycle that it can take. They lie in 32
// registers a thread, fetched before the wait for the kernel in front: in a chain of dependent launches that costs no
// time. After the wait, in cycles, counted on the SASS: addresses 40, one trip to L2 for y, streams, post and comb
// about 300, 10 FMAs and rounding 60, shared memory and a barrier 60, 32 FMAs in a chain 130, 5 shuffles 130, a
// store: 720, 0.4 us. Every block of a range computes the way back of the whole range again, which takes less time
// than a second trip would. (The first version loaded comb behind y and divided by the number of ranges behind the
// wait: 600 cycles more.) From about 16 tokens on fn is read too often: 1.6 MB a group of tokens.
//
// many: one block has a range and all 24 rows, four rows a warp, fn in 128 registers a thread; tokens stream through
// shared memory by cp.async, a tile ahead, two blocks to a multiprocessor. In the SASS a token and warp take about 215
// issue slots, 128 of them FMAs (32 widen BF16): 60 % of the FMA rate at best, 185 us for 8,192 tokens of Flash.
// A third row set in 8 warps instead of 4 in 6 would have 96 FMAs for 180 slots.
//
// any: `few` for any M, fn from L2 where it is used. Built for being right.
//
// Measured on an H100 (bench/mhc_forms.py): the whole step at one token 5.6 us with `few`, 6.2 with `many`; from 12
// tokens on `many` is the faster, 8,192 tokens in 638 us against 1,450.
#include "common/mhc_mix.cuh"

#define MIX_ARGUMENTS(T) T *streams, const float *fn, float *partial, int tokens, int d, int n, int m, int groups
#define POST_MIX_ARGUMENTS(T) const T *y, const T *before, const float *post, const float *comb, MIX_ARGUMENTS(T)
#define FEW extern "C" __global__ void __launch_bounds__(mhc::FEW_THREADS)
#define MANY extern "C" __global__ void __launch_bounds__(mhc::MANY_THREADS, 2)

#define KERNELS(T)                                                                                   \
  FEW mhc_mix_few_##T(MIX_ARGUMENTS(T)) {                                                            \
    __shared__ float4 x[2][4 * mhc::QUADS];                                                          \
    mhc::few<T, 4, false>({streams}, fn, partial, tokens, d, n, 4, groups, x);                       \
  }                                                                                                  \
  FEW mhc_mix_any_##T(MIX_ARGUMENTS(T)) {                                                            \
    __shared__ float4 x[2][mhc::MOST * mhc::QUADS];                                                  \
    mhc::few<T, 0, false>({streams}, fn, partial, tokens, d, n, m, groups, x);                       \
  }                                                                                                  \
  MANY mhc_mix_many_##T(MIX_ARGUMENTS(T)) {                                                          \
    __shared__ mhc::Tile<T, false> tiles[2];                                                         \
    mhc::many<T, false>({streams}, fn, partial, tokens, d, groups, tiles);                           \
  }                                                                                                  \
  FEW mhc_post_mix_few_##T(POST_MIX_ARGUMENTS(T)) {                                                  \
    __shared__ float4 x[2][4 * mhc::QUADS];                                                          \
    mhc::few<T, 4, true>({streams, y, before, post, comb}, fn, partial, tokens, d, n, 4, groups, x); \
  }                                                                                                  \
  MANY mhc_post_mix_many_##T(POST_MIX_ARGUMENTS(T)) {                                                \
    __shared__ mhc::Tile<T, true> tiles[2];                                                          \
    mhc::many<T, true>({streams, y, before, post, comb}, fn, partial, tokens, d, groups, tiles);     \
  }

KERNELS(bf16)
KERNELS(float)
