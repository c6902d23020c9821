// The first half of the output projection for few tokens, as stored rows: matmul_few.cu's product, then quantize.cu's bytes.
//
// Moves   the weights once for eight tokens; all else is small.
// Floor   at 3.0 TB/s: 11.2 us for Flash's wo_a (33.6 MB of E4M3), 22.4 us for Pro's.
// Form    128 rows, which share a scale, are eight tiles of 16. A cluster has them, each of its blocks so many tiles, one after
//         another. A block keeps its numbers as the product rounds them, tells the others of the cluster each token's
//         largest, and stores its own under the scale of the largest of all. Sums are those of matmul_few.cu; a largest has
//         no order.
//
// arch: sm_90a
#include "common/formats.cuh"
#include "common/matmul_few.cuh"
#include "common/peers.cuh"

constexpr int R = 16, BLOCK_TILES = SCALE_ROWS / R, MOST_CLUSTER = 8;

// In dynamic memory, as what a block of a cluster has of its own behind the host shim.
struct Kept {
  bf16 numbers[BLOCK_TILES][bf16_few::NT][R];
  u32 tops[MOST_CLUSTER][bf16_few::NT];
  Barrier full[bf16_few::MOST_STAGES], empty[bf16_few::MOST_STAGES], sent;
};

template <class W>
__device__ __forceinline__ void grouped_quant(const TensorMap& weight, const u8* scale, const bf16* x, i64 stride,
                                              const Stored& to, const bf16_few::Sizes& s) {
  using namespace bf16_few;
  DYNAMIC_SHARED(__align__(1024) u8, shared);
  const int size = cluster_size(), rank = cluster_rank(), turns = BLOCK_TILES / size;
  const int cluster = blockIdx.x / size, block = cluster / s.parts, start = cluster % s.parts * NT;
  const int tokens = min(NT, s.tokens - start), boxes = (s.columns + W::COLUMNS - 1) / W::COLUMNS;
  const int group = block * SCALE_ROWS / (s.rows / s.groups);
  const Work work{group, block * BLOCK_TILES + rank * turns, 1, turns, start, tokens};
  u8* const input = shared + s.stages * SLICE_BOXES * R * BOX_BYTES;
  float* const sums = reinterpret_cast<float*>(input + boxes * W::X_BOXES * tokens * BOX_BYTES);
  Kept& kept = *reinterpret_cast<Kept*>(sums + 2 * ((boxes + W::CHAIN - 1) / W::CHAIN) * R * NT);
  const Memory memory{kept.full, kept.empty, shared, input, sums};
  pdl_trigger();
  if (threadIdx.x == 0) {
    begin_ring(memory, s.stages);
    kept.sent.init(1);
    kept.sent.arrive_expecting(size * tokens * 4);
    fence_barriers();
  }
  __syncthreads();
  begin_cluster();
  if (threadIdx.x >= WORKERS) {
    if (threadIdx.x == WORKERS) feed<R, W>(weight, s, work, memory);
    __syncwarp();
    await_cluster();
    pdl_wait();
    return;
  }
  pdl_wait();
  multiply<R, W>(scale, x, stride, s, work, memory, [&](int turn, int row, int token, float sum) {
    kept.numbers[turn][token][row % R] = narrow<bf16>(sum);
  });
  await_cluster();  // nothing is sent to a block before it has begun
  meet<WORKERS>(1);
  constexpr int LANES = BLOCK_TILES * R / EIGHT;  // of a token; those that have eight numbers here are the first
  if (threadIdx.x >= NT * LANES) return;
  const int token = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const bool there = token < tokens, live = there && lane < turns * R / EIGHT;
  float v[8] = {};
  if (live) widen(*reinterpret_cast<const Raw8<bf16>*>(&kept.numbers[lane / 2][token][lane % 2 * EIGHT]), v);
  u32 top = group_max<LANES>(largest(v));
  if (there && lane < size) send4(in_peer(&kept.tops[rank][token], lane), top, in_peer(&kept.sent, lane));
  if (!live) return;
  kept.sent.wait_cluster(0);
  for (int from = 0; from < size; from++) top = max(top, kept.tops[from][token]);
  const bool broken = top >= INFINITY_BITS;
  const u32 byte = Fp8Row::scale_byte(top);
  u32 low = 0, high = 0;
  if (!broken) Fp8Row::codes(v, byte, low, high);
  u8* const row = to.data + static_cast<i64>(start + token) * to.n + block * SCALE_ROWS;
  *reinterpret_cast<uint2*>(row + rank * turns * R + lane * EIGHT) = make_uint2(low, high);
  if (rank == 0 && lane == 0)
    to.scale[static_cast<i64>(start + token) * (to.n / SCALE_ROWS) + block] = broken ? UE8M0_NAN : byte;
}

#define GROUPED_QUANT(NAME, W)                                                                                          \
  extern "C" __global__ void __launch_bounds__(288, 2) grouped_quant_##NAME(                                            \
      const __grid_constant__ TensorMap weight, const u8* scale, const bf16* x, i64 stride, u8* data, u8* data_scale,   \
      int rows, int columns, int tokens, int groups, int parts, int stages) {                                           \
    grouped_quant<W>(weight, scale, x, stride, {data, data_scale, rows}, {rows, columns, tokens, groups, parts, stages}); \
  }

GROUPED_QUANT(bf16, Bf16Weights)
GROUPED_QUANT(e4m3, E4m3Weights)
