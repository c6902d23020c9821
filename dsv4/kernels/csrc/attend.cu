// Sparse attention over stored rows for decode: gather, widen, softmax with a sink, the way back, FP8 if asked for.
//
// Moves   a token of CSA: 640 rows of 584 bytes, queries and values 64 KiB each (Flash): 0.5 MB. HCA at 1M: 4.9 MB a token.
// Floor   at 3.0 TB/s: 0.2 us, and 1.7 us. One token is latency: gather, widen, two products, the merge. Of 64 tokens the
//         products count: 5.4 GFLOP are 5.4 us of BF16 peak.
// Form    heads are the 16 rows of mma.m16n8k16, cache rows its 8; a row is widened to BF16 once (exactly: E4M3 times a power
//         of two) and is key and value from the same place. Queries stay in registers as far as these go. Eight warps
//         bring halves of chunks and widen them, a chunk ahead of the eight that multiply: a warp has a box of 64 columns,
//         and the one whose columns are BF16 already reads which rows come three chunks later and finds their addresses.
//         Named barriers hand chunks over.
// Order   a chunk is 64 entries; its scores are sums of two chains, its weights are relative to its own largest score, its
//         values start from zero. Chunk c belongs to strand c mod 32, whose chunks are folded ascending; then strands are
//         folded ascending. So a token's bits follow from its own list, and absent entries behind it change none: not from
//         how many blocks share the strands out, how many heads are a tile, or how long the list is that others need.
// Cluster a tile's strands lie on up to 16 blocks, which merge them through each other's memory. Where there are many tokens a
//         block has all strands of its tile, of one chunk each, and folds them as they come.
// Measured on an H100 (bench/results/2026-11-27-ops-second.jsonl), Flash, when its warps handed chunks over by arrivals: CSA 10.6
//         us, 64 tokens 47.3; HCA with 64 entries 9.4 and 23.9, with 8,192 34.8 and 1,208. Not since.
// Tried   four warps that widen: 11.8 us and 68.6, with 8,192 entries 48.8.
// Counted a chunk of 16 heads moves about 2,400 cycles' worth of shared memory, one of 32 heads 3,800 (a third of it rows for
//         scores, a third rows for values), and a scheduler issues 2,000 or 2,650 instructions for it, 550 of each of its
//         two feeders: with 32 heads a quarter of BF16 peak is the most that this form can reach. More needs wgmma, with
//         rows of the cache on its 64 and heads on its other side: it reads rows once for 64 heads.
//
// The row's bytes: dsv4/quant/kv_rows.py.
//
// arch: sm_90a
#include "common/attend.cuh"

#define ATTEND(M)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(attend::THREADS, 1) attend_##M(                                          \
      const bf16* q, const u8* near, i64 near_bytes, int near_page, const i64* near_rows, int near_count, const u8* far, \
      i64 far_bytes, int far_page, const i64* far_rows, int far_count, const float* sink, const float* cos,             \
      const float* sin, int heads, int tiles, bf16* y, u8* data, u8* scale) {                                           \
    attend::run<M>(q, {{near, near_bytes, near_page, near_rows, near_count}, {far, far_bytes, far_page, far_rows, far_count}}, \
                   sink, {cos, sin, attend::TURNED, true}, heads, tiles, {y, data, scale});                             \
  }

ATTEND(1)
ATTEND(2)
