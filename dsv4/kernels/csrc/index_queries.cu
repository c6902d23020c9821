// Queries of the indexer: rotated, spread, stored as keys are, and the weights of their heads.
//
// Moves   8,192 tokens of 64 heads of 128: reads 128 MiB, writes 34 MiB of FP4. One token: 16 KiB.
// Floor   at 3.0 TB/s: 57 us. One token: latency.
// Form    half a warp a head.
// Measured on an H100 (bench/results/2026-11-27-ops-second.jsonl): one token 1.8 us, 8,192 tokens 131.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/heads.cuh"
#include "common/index_vectors.cuh"

using namespace index_vectors;

constexpr int TURNED = 64, FIRST = DIMS - TURNED, BLOCK_HEADS = 16;

// q [tokens, heads, 128], rows of a token `stride` apart; logits [tokens, heads], rows `apart` apart.
template <class Layout>
__device__ __forceinline__ void queries(const bf16* q, i64 stride, const float* logits, i64 apart, int heads, const Turn& turn,
                                        int spread, float by, u8* data, u8* scales, float* weights) {
  pdl_trigger();
  pdl_wait();
  const int parts = (heads + BLOCK_HEADS - 1) / BLOCK_HEADS, lane = threadIdx.x % LANES;
  const int token = blockIdx.x / parts, head = blockIdx.x % parts * BLOCK_HEADS + threadIdx.x / LANES;
  const bool there = head < heads;
  const i64 row = static_cast<i64>(token) * heads + (there ? head : 0);
  const int column = lane * EIGHT;
  Raw8<bf16> raw;
  load_whole(raw, q + token * stride + (there ? head : 0) * DIMS + column);
  float v[8];
  widen(raw, v);
  if (column >= FIRST) turn.eight<bf16>(v, token, column - FIRST);
  if (spread) hadamard(v, lane);
  Layout::store(v, there ? column : DIMS, data + row * Layout::BYTES, scales + row * 4);
  if (there && lane == 0) weights[row] = round_bf16(round_bf16(logits[token * apart + head]) * by);
}

#define INDEX_QUERIES(format, Format)                                                                              \
  extern "C" __global__ void __launch_bounds__(256) index_queries_##format(                                        \
      const bf16* q, i64 stride, const float* logits, i64 apart, int heads, const float* cos, const float* sin,    \
      int spread, float by, u8* data, u8* scales, float* weights) {                                                \
    queries<index_vectors::Format>(q, stride, logits, apart, heads, {cos, sin, TURNED, false}, spread, by, data, scales, weights); \
  }

INDEX_QUERIES(fp4, Fp4)
INDEX_QUERIES(fp8, Fp8)
