// FP8 experts: those of the Base releases, whose scales are FP32 numbers, and of repacked ones. They are E4M3 already.
//
// Moves   176 MB for one token of Flash, 25.2 of them for the shared expert: 57 us at 3.08 TB/s.
// Measured  not yet.
//
// arch: sm_90a
#include "common/experts.cuh"

EXPERTS(fp8, PackedFp8)
