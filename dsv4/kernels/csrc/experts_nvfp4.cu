// NVFP4 experts. A code times the E4M3 scale of its 16 columns has up to six significant bits: it is widened to two E4M3
// numbers whose sum it is, the first four bits and the others, and both are multiplied. So nothing is rounded, tokens stay
// E4M3, and the tensor cores take twice as long, as with BF16 (which needs all tokens once more as BF16, and twice the
// room for them). In tiles that stand apart they sum 16 columns at a time.
//
// Moves   84.9 MB for the routed experts of one token of Flash, and 25.2 for the shared one: 36 us at 3.08 TB/s.
// Measured  on an H100, Flash: one token 58 us, 64 tokens 1,107 (bench/results/2026-11-27-ops-second-before.jsonl); 8,192 not
//         since the shared expert's tokens are laid out by many blocks.
//
// arch: sm_90a
#include "common/experts.cuh"

EXPERTS(nvfp4, PackedNvfp4)
