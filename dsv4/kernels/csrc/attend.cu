// Sparse attention over stored rows for decode: gather, widen, softmax with a sink, the way back, FP8 if asked for.
//
// Moves   a token of CSA: 640 rows of 584 bytes, queries and values 64 KiB each (Flash): 0.5 MB. HCA at 1M: 4.9 MB a token.
// Floor   at 3.0 TB/s: 0.2 us, and 1.7 us. One token is latency: gather, widen, two products, the merge. Of 64 tokens the
//         products count: 5.4 GFLOP are 5.4 us of BF16 peak.
// Form    up to 64 heads are the rows of wgmma, 64 cache rows a chunk. A block has half the columns of a tile's heads, another
//         block of its cluster the others: so a chunk takes half of each row, widened to BF16 once (exactly: E4M3 times a
//         power of two), key and value from the same place, and values fit into the registers of a warpgroup. The two send
//         each other their halves of the scores, which are sums of two. A pair of blocks has two streams of chunks: in each
//         block a warpgroup multiplies for a stream, while a team of four warps brings and widens its next chunks. Nothing
//         but the rows in shared memory is shared between streams, so each hides what the other waits for. Weights go from
//         one product to the other in registers.
// Order   a chunk is 64 entries; its weights are relative to its own largest score, its values start from zero. Chunk c belongs
//         to strand c mod 32, whose chunks are folded ascending; then strands with even numbers are folded ascending, those
//         with odd ones too, and the odd behind the even. So a token's bits follow from its own list, and absent entries
//         behind it change none: not from how many blocks share the strands out, how many heads are a tile, or how long the
//         list is that others need.
// Cluster strands lie on up to 8 pairs of blocks, which merge them through each other's memory. Where there are many tokens a
//         pair has all strands of its tile: of one chunk each, its streams fold them as they come; of several, each is folded
//         behind those before it, which wait in shared memory.
// Measured on an H100 (bench/results/2026-11-28-attend.jsonl): CSA 11.2 us, 64 tokens 27.2; HCA with 64 entries 9.0 and 15.0; with
//         8,192 40.5 and 465; of Pro CSA 19.3 and 80.1. One token's arguments, 64 sets of them, are in the second cache; in a
//         layer, cold, it takes 12 to 17. Beside it FlashMLA (2026-11-28-peers.jsonl): CSA 15.6 and 47.8, Pro 16.8 and 62.2;
//         4,096 tokens of a prompt 661 of Flash and 2,228 of Pro on rows decoded before, where this takes 1,570 and 4,743.
// Tried   in the same file: "mma.sync", 16 or 32 heads a tile, eight warps that widen and eight that multiply: CSA 10.8 and 43.8,
//         8,192 entries 34.1. "one stream": both warpgroups of a block on one chunk, the next one's scores ahead, meet twice a
//         chunk and wait alike: 13.2, 45.1. "bulk copies" of rows: a warp issues them a lane at a time, 11.7 and 32.8. "teams":
//         four warps a stream that widen, instead of eight for both: 11.9 and 29.9.
// Wide    attend_wide reads rows that are BF16 already, in the same order with the same bits: for prompts, whose tokens see
//         much the same rows, so that they are decoded once (read_kv) and not by each token. A chunk of the feeders is 8 copies a
//         thread then. 4,096 tokens read 2.7 GB by way of the second cache. Not timed yet.
// Limit   the eight feeders: half of the time who multiplies waits for rows. A chunk of theirs is 320 instructions a warp, in
//         which little else is under way.
//
// The row's bytes: dsv4/quant/kv_rows.py.
//
// arch: sm_90a
#include "common/attend.cuh"

extern "C" __global__ void __launch_bounds__(attend::THREADS, 1) attend_tiles(
    const bf16* q, const u8* near, i64 near_bytes, int near_page, const i64* near_rows, int near_count, const u8* far,
    i64 far_bytes, int far_page, const i64* far_rows, int far_count, const float* sink, const float* cos, const float* sin,
    int heads, int tiles, int wide, int slots, int stages, int ring, bf16* y, u8* data, u8* scale) {
  attend::run<false>(q, {{near, near_bytes, near_page, near_rows, near_count}, {far, far_bytes, far_page, far_rows, far_count}},
              sink, {cos, sin, attend::TURNED, true}, {heads, tiles, wide, slots, {stages, ring}}, {y, data, scale});
}

extern "C" __global__ void __launch_bounds__(attend::THREADS, 1) attend_wide(
    const bf16* q, const u8* near, const i64* near_rows, int near_count, const u8* far, const i64* far_rows, int far_count,
    const float* sink, const float* cos, const float* sin, int heads, int tiles, int wide, int slots, int stages, int ring,
    bf16* y, u8* data, u8* scale) {
  attend::run<true>(q, {{near, attend::WIDE_ROW, 1, near_rows, near_count}, {far, attend::WIDE_ROW, 1, far_rows, far_count}},
                    sink, {cos, sin, attend::TURNED, true}, {heads, tiles, wide, slots, {stages, ring}}, {y, data, scale});
}
