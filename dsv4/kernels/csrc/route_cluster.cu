// The router of up to eight BF16 tokens in one launch: a cluster multiplies, its first blocks choose, a token each.
//
// Moves   the gate once: Flash 256 x 4096, 2.1 MB, 131 KB a block. All of it is on its way in front of the wait for x.
// Form    a block of the cluster has 16 rows of the gate, all at once in shared memory; a warp takes every eighth slice
//         of 256 columns. The slices' sums are added in order, as in matmul_few.cu, so the bits are those of the product
//         alone. Logits go to the block of their token (st.async), which waits for the bytes of all of them.
// Why a cluster, and no last block that counts the others: such a count has to outlive the call, two streams would share
//         it, and fence, count and reading take about what the second launch takes (0.8 us a chained kernel).
// Estimate behind the wait, in cycles: x 700, two slices a warp 300, sums 200, logits to their block 300, scores and six
//         choices 1,600: 1.8 us, where two launches need 0.7 us more. Not measured yet.
// Not for Pro: its 384 x 7168 are 344 KB a block, of which 200 find room before the wait. The others would take 1.3 us
//         and more behind it.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/copy.cuh"
#include "common/peers.cuh"
#include "common/route.cuh"
#include "common/weights.cuh"

constexpr int ROWS = 16, TOKENS = 8, WARPS = 8, THREADS = 32 * WARPS, EXPERTS = 256, CHOICES = 32, MOST_SLICES = 24;
constexpr int HEAD = 4096;  // bytes for `Own`
constexpr int BOX = ROWS * BOX_BYTES, STAGE = SLICE_BOXES * BOX;

struct Own {
  Barrier full[MOST_SLICES], got;
  i64 chosen[CHOICES];
  float bias[EXPERTS], logits[EXPERTS], scores[EXPERTS];
};
static_assert(sizeof(Own) <= HEAD);

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    route_cluster(const __grid_constant__ TensorMap gate, const bf16* x, i64 stride, const float* bias, const i64* chosen,
                  float scale, i64* experts, float* weights, int tokens, int count, int k, int columns) {
  DYNAMIC_SHARED(__align__(1024) u8, memory);
  const int boxes = (columns + BOX_COLUMNS - 1) / BOX_COLUMNS, slices = (boxes + SLICE_BOXES - 1) / SLICE_BOXES;
  const int apart = tokens * BOX_BYTES, rank = cluster_rank(), row = rank * ROWS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Own& own = *reinterpret_cast<Own*>(memory);
  u8* const ring = memory + HEAD;
  u8* const input = ring + slices * STAGE;                              // [boxes][tokens][128]
  float* const sums = reinterpret_cast<float*>(input + boxes * apart);  // [slices][ROWS][TOKENS]
  pdl_trigger();
  if (threadIdx.x == 0) {
    for (int i = 0; i < slices; i++) own.full[i].init(1);
    own.got.init(1);
    fence_barriers();
    own.got.arrive_expecting(rank < tokens ? count * 4 : 0);
  }
  __syncthreads();
  begin_cluster();
  if (lane == 0) {
    const u64 policy = evict_first();
    for (int slice = warp; slice < slices; slice += WARPS) {
      const int here = min(SLICE_BOXES, boxes - slice * SLICE_BOXES);
      own.full[slice].arrive_expecting(here * BOX);
      for (int i = 0; i < here; i++)
        copy_box(ring + slice * STAGE + i * BOX, gate, (slice * SLICE_BOXES + i) * BOX_BYTES, row, own.full[slice], policy);
    }
  }
  for (int e = threadIdx.x; bias && rank < tokens && e < count; e += THREADS) own.bias[e] = bias[e];
  pdl_wait();
  for (int i = threadIdx.x; i < boxes * tokens * 8; i += THREADS) {
    const int box = i / (tokens * 8), t = i / 8 % tokens, piece = i % 8, column = box * BOX_COLUMNS + piece * EIGHT;
    const bool there = column < columns;
    copy_async<16>(input + box * apart + t * BOX_BYTES + 16 * (piece ^ (t & 7)), x + t * stride + (there ? column : 0), there);
  }
  if (chosen && rank < tokens && threadIdx.x < k) own.chosen[threadIdx.x] = chosen[static_cast<i64>(rank) * k + threadIdx.x];
  copies_done();
  __syncthreads();
  const int g = lane / 4, t = lane % 4;
  const int token = min(g, tokens - 1);  // places of tokens that are not there repeat the last: nobody reads their sums
  for (int slice = warp; slice < slices; slice += WARPS) {
    const int first = slice * SLICE_BOXES, here = min(SLICE_BOXES, boxes - first);
    float d[4] = {};
    own.full[slice].wait(0);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < SLICE_BOXES; i++) {
      if (i >= here) break;
      const u8* const w = ring + slice * STAGE + i * BOX;
      const u8* const v = input + (first + i) * apart;
#pragma unroll
      for (int h = 0; h < 2; h++)
        mma(d, Bf16Weights::piece(w, g, t, h), Bf16Weights::piece(w, g + 8, t, h),
            Bf16Weights::tokens(v, apart, token, t, h, 0));
    }
    float* const to = sums + (slice * ROWS + g) * TOKENS + 2 * t;
    *reinterpret_cast<float2*>(to) = make_float2(d[0], d[1]);
    *reinterpret_cast<float2*>(to + 8 * TOKENS) = make_float2(d[2], d[3]);
  }
  __syncthreads();
  await_cluster();
  const int r = threadIdx.x % ROWS, of = threadIdx.x / ROWS;
  if (of < tokens && row + r < count) {
    float sum = 0;
#pragma unroll 4
    for (int slice = 0; slice < slices; slice++) sum += sums[(slice * ROWS + r) * TOKENS + of];
    send4(in_peer(own.logits + row + r, of), __float_as_uint(sum), in_peer(&own.got, of));
  }
  if (rank >= tokens || warp) return;  // to whom nobody sends
  own.got.wait_cluster(0);
  choose<EXPERTS / 32>({bias ? own.bias : nullptr, scale, experts, weights, count, k}, rank, own.logits,
                       chosen ? own.chosen : nullptr, own.scores);
}
