// Query heads of a few tokens: the product of linear_fp8.cu, then norm and rotation as rope.cu has them, bit for bit.
//
// Moves   the weights once; all else is small.
// Floor   at 3.0 TB/s: 11.2 us for 33.6 MB (64 heads of 1,024 columns), 33.6 us for 100.7 MB (128 of 1,536).
// Form    a cluster has a head of 512 rows, each of its blocks so many tiles of 64 of it, one after another; the order of the
//         products' sums is that of one segment. A block keeps its tiles as the product rounds them. A tile is eight times
//         eight columns: as soon as it is there, the sum of squares of each eight goes to all blocks of the cluster, and the
//         last of them to come let each block add up all 64 as a warp of rope.cu does, and finish its own columns.
// Why so  512 rows in one block leave half of the multiprocessors of an H100 without a head of Flash. What blocks tell each
//         other is 256 bytes a token; all but the last tile's are on their way while weights still come.
//
// arch: sm_90a
#include "common/heads.cuh"
#include "common/linear_few.cuh"

constexpr int HEAD = 512, HEAD_TILES = HEAD / e4m3_few::TILE_ROWS, TILE_EIGHTS = e4m3_few::TILE_ROWS / EIGHT;
constexpr int PITCH = HEAD / EIGHT + 8;  // from token to token, of a tile and of sums: so four of them meet in no bank

// In dynamic memory, as what a block of a cluster has of its own behind the host shim.
struct Barriers {
  Barrier full[e4m3_few::MOST_STAGES], empty[e4m3_few::MOST_STAGES], sent;
};

template <int NT, class T>
__device__ __forceinline__ void linear_heads(const e4m3_few::Product<T>& p, float eps, const Turn& by) {
  using namespace e4m3_few;
  DYNAMIC_SHARED(__align__(1024) u8, memory);
  const int size = cluster_size(), turns = HEAD_TILES / size, top = cluster_rank() * turns;  // tiles here, the first of them
  const int head = blockIdx.x / size, heads = gridDim.x / size;
  const auto tile_of = [&](int turn) { return head * HEAD_TILES + top + turn; };
  const auto column_of = [&](int token) { return static_cast<i64>(token) * p.blocks; };
  u8* const tokens = memory + p.stages * TILE_BYTES;                                  // [blocks][NT][128]
  float* const scale = reinterpret_cast<float*>(tokens + p.blocks * NT * ROW_BYTES);  // [blocks][NT]
  T* const kept = reinterpret_cast<T*>(scale + p.blocks * NT);                        // [turns][NT][PITCH]
  float* const squares = reinterpret_cast<float*>(kept + turns * NT * PITCH);         // [NT][PITCH], of the whole head
  Barriers& barriers = *reinterpret_cast<Barriers*>(squares + NT * PITCH);
  float* const own = reinterpret_cast<float*>(&barriers + 1);                         // [turns][blocks]
  Columns<NT> columns{barriers.full, barriers.empty, memory, tokens, scale, own, p.stages, 0, p.blocks};
  pdl_trigger();
  if (threadIdx.x == 0) {
    columns.begin();
    barriers.sent.init(1);
    barriers.sent.arrive_expecting(HEAD / EIGHT * p.tokens * 4);
    fence_barriers();
  }
  __syncthreads();
  begin_cluster();
  if (threadIdx.x >= WORKERS) {
    if (threadIdx.x == WORKERS) columns.feed(p.weight, turns, tile_of);
    __syncwarp();
    await_cluster();
    pdl_wait();
    return;
  }
  columns.scales(p.weight_scale, p.blocks, turns, tile_of);
  pdl_wait();
  columns.bring(p.x, p.x_scale, p.tokens, column_of);
  constexpr int D = NT / 2;
  const int row = columns.row(), column = columns.column(), lane = threadIdx.x % 32, eight = lane % TILE_EIGHTS;
  for (int turn = 0; turn < turns; turn++) {
    float sum[D];
    columns.sums(sum, turn);
    T* const tile = kept + turn * NT * PITCH;
#pragma unroll
    for (int i = 0; i < D; i++) tile[(i / 4 * 8 + column + i % 2) * PITCH + row + i / 2 % 2 * 8] = narrow<T>(sum[i]);
    meet<WORKERS>(1);
    if (turn == 0) await_cluster();  // nothing is sent to a block before it has begun
    for (int token = threadIdx.x / TILE_EIGHTS; token < p.tokens; token += WORKERS / TILE_EIGHTS) {
      float v[8];
      widen(*reinterpret_cast<const Raw8<T>*>(tile + token * PITCH + eight * EIGHT), v);
      const u32 part = __float_as_uint(rounded_squares<T>(v));
      const float* const place = squares + token * PITCH + (top + turn) * TILE_EIGHTS + eight;
      for (int to = 0; to < size; to++) send4(in_peer(place, to), part, in_peer(&barriers.sent, to));
    }
  }
  // A warp has the eights of four tiles, of one token or another, at a time.
  const int tiles = p.tokens * turns;
  for (int start = threadIdx.x / 32 * 4; start < tiles; start += WORKERS / TILE_EIGHTS) {
    const int at = start + lane / TILE_EIGHTS, here = min(at, tiles - 1), token = here / turns, turn = here % turns;
    const int from = (top + turn) * TILE_ROWS + eight * EIGHT, turned = from - (HEAD - by.dims);
    Angles angles;
    if (turned >= 0) angles = by.angles(token, turned);
    float v[8], sum = 0;
    widen(*reinterpret_cast<const Raw8<T>*>(kept + (turn * NT + token) * PITCH + eight * EIGHT), v);
    barriers.sent.wait_cluster(0);
#pragma unroll
    for (int chunk = 0; chunk < HEAD / WARP_COLUMNS; chunk++) {
      const float* const part = squares + token * PITCH + chunk * 32 + eight;
      sum += eight_sum({part[0], part[8], part[16], part[24]});
    }
    const float factor = unit_factor<T>(sum, HEAD, eps);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = rounded<T>(v[j] * factor);
    if (turned >= 0) by.eight<T>(v, angles);
    Raw8<T> raw;
    pack(raw, v);
    if (at < tiles) store_whole(p.y + (static_cast<i64>(token) * heads + head) * HEAD + from, raw);
  }
}

#define LINEAR_HEADS(T, NT)                                                                                            \
  extern "C" __global__ void __launch_bounds__(160, 2) linear_heads_##T##_##NT(                                        \
      const __grid_constant__ TensorMap weight, const u8* weight_scale, const u8* x, const u8* x_scale, T* y,          \
      int blocks, int tokens, int stages, float eps, const float* cos, const float* sin, int dims) {                   \
    linear_heads<NT, T>({weight, weight_scale, x, x_scale, y, 0, blocks, tokens, 1, stages}, eps, {cos, sin, dims, false}); \
  }

LINEAR_HEADS(bf16, 8)
LINEAR_HEADS(bf16, 16)
LINEAR_HEADS(bf16, 32)
LINEAR_HEADS(float, 8)
LINEAR_HEADS(float, 16)
LINEAR_HEADS(float, 32)
