// FP8 experts: those of the Base releases, whose scales are FP32 numbers, and of repacked ones. They are E4M3 already.
//
// Moves   176 MB for one token of Flash, 25.2 of them for the shared expert: 57 us at 3.08 TB/s.
// Measured  on an H100 (bench/results/2026-11-27-ops-second.jsonl), Flash: one token 71 us, 64 tokens 1,655, 8,192 7,308.
//
// arch: sm_90a
#include "common/experts.cuh"

EXPERTS(fp8, PackedFp8)
