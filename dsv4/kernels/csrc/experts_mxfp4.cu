// The experts of the instruct releases: MXFP4, widened to E4M3 in registers with the scales of 32 columns folded in where
// 15 exponents hold those of 128 columns. In tiles that stand apart the tensor cores sum 32 columns at a time.
//
// Moves   the weights of all experts that somebody chose and of the shared one, once; all else is small.
// Floor   at 3.08 TB/s: 34 us for the 105.4 MB that one token of Flash takes, both matrices together.
// Measured  on an H100 (bench/results/2026-11-27-expert-parts.jsonl), Flash: one token 31 us and 21 us, 64 tokens 623 and 306,
//         8,192 3,921 and 2,093: 480 TFLOP/s of about 1,450. What limits there: a warp has about 300 instructions for 64 x
//         128 x 128 that the tensor cores do in 256 cycles, half of them to scale and add the sums.
// Tried   the second matrix beside the first, its first weights on their way when that ends, and all other kernels early
//         too: 68 us for one token, 1,323 for 64. They are launched one after another now (dsv4/kernels/experts.py).
//
// arch: sm_90a
#include "common/experts.cuh"

EXPERTS(mxfp4, PackedMxfp4)
