// The product of E4M3 matrices with a few tokens, in whole blocks of a launch: csrc/linear_fp8.cu says how.
#pragma once
#include "common/formats.cuh"
#include "common/copy.cuh"
#include "common/peers.cuh"
#include "common/share.cuh"
#include "common/wgmma.cuh"

namespace e4m3_few {

constexpr int TILE_ROWS = 64, BLOCK_COLUMNS = 128, TILE_BYTES = TILE_ROWS * BLOCK_COLUMNS;
constexpr int MOST_STAGES = 12, WORKERS = 128, MOST_INBOXES = 4;

template <class T>
struct Product {
  const TensorMap& weight;
  const u8* weight_scale;  // [rows / 128, blocks]
  const u8* x;             // [tokens, groups, columns]
  const u8* x_scale;       // [tokens, groups, blocks]
  T* y;                    // [tokens, rows]
  int tiles, blocks, tokens, groups, stages;
};

// A block's columns of a product, for one tile of rows after another: weights through a ring that one thread keeps filled,
// tokens and scales in shared memory. Without the thread of the ring, WORKERS threads do all of it together.
template <int NT>
struct Columns {
  static constexpr int D = NT / 2;
  Barrier* full;
  Barrier* empty;
  u8* ring;      // [stages] tiles
  u8* tokens;    // [count][NT][128]
  float* scale;  // [count][NT]
  float* own;    // [turns][count], the weights'
  int stages, first, count;
  int stage = 0, round = 0, done = 0;  // done: the oldest stage that is not given back

  // By one thread, before the others use a barrier.
  __device__ void begin() const {
    for (int i = 0; i < stages; i++) full[i].init(1), empty[i].init(WORKERS / 32);
  }

  // The thread of the ring. tile_of: of each turn, by its rows.
  template <class TileOf>
  __device__ void feed(const TensorMap& weight, int turns, const TileOf& tile_of) const {
    const u64 policy = evict_first();
    int stage = 0, round = 0;
    for (int turn = 0; turn < turns; turn++) {
      const int row = tile_of(turn) * TILE_ROWS;
      for (int b = 0; b < count; b++) {
        if (round) empty[stage].wait((round - 1) & 1);
        full[stage].arrive_expecting(TILE_BYTES);
        copy_box(ring + stage * TILE_BYTES, weight, (first + b) * BLOCK_COLUMNS, row, full[stage], policy);
        if (++stage == stages) stage = 0, round++;
      }
    }
  }

  // weight_scale: [rows / 128, blocks].
  template <class TileOf>
  __device__ void scales(const u8* weight_scale, int blocks, int turns, const TileOf& tile_of) const {
    for (int i = threadIdx.x; i < turns * count; i += WORKERS)
      own[i] = ue8m0_float(weight_scale[static_cast<i64>(tile_of(i / count) / 2) * blocks + first + i % count]);
  }

  // column_of: where the first 128 columns of a token lie, in so many.
  template <class ColumnOf>
  __device__ void bring(const u8* x, const u8* x_scale, int there, const ColumnOf& column_of) const {
    for (int i = threadIdx.x; i < count * NT * 8; i += WORKERS) {  // pieces of 16 bytes, all on their way at once
      const int b = i / (NT * 8), t = i / 8 % NT, piece = i % 8;
      const bool live = t < there;
      const u8* const from = x + (column_of(live ? t : 0) + b) * BLOCK_COLUMNS + 16 * piece;
      copy_async<16>(tokens + (b * NT + t) * ROW_BYTES + 16 * (piece ^ (t & 7)), from, live);
    }
    for (int i = threadIdx.x; i < count * NT; i += WORKERS) {
      const int b = i / NT, t = i % NT;
      scale[i] = t < there ? ue8m0_float(x_scale[column_of(t) + b]) : 0.0f;
    }
    copies_done();
    fence_shared();
    meet<WORKERS>(1);
  }

  // Sums of this turn's tile: i is row `row + i / 2 % 2 * 8` of token `i / 4 * 8 + column + i % 2`.
  __device__ static int row() { return 16 * (threadIdx.x / 32) + threadIdx.x % 32 / 4; }
  __device__ static int column() { return threadIdx.x % 4 * 2; }

  __device__ void sums(float (&sum)[D], int turn) {
    float even[D], odd[D];
#pragma unroll
    for (int i = 0; i < D; i++) sum[i] = 0;
    // Two products at a time, none of them under way from one pass of the loop to the next: ptxas would copy their sums
    // then, and to that end run one product after the other.
    int b = 0;
    for (; b + 1 < count; b += 2) {
      start(even, b);
      start(odd, b + 1);
      wgmma_wait<1>();
      finish(even, sum, turn, b);
      wgmma_wait<0>();
      finish(odd, sum, turn, b + 1);
    }
    if (b < count) {
      start(even, b);
      wgmma_wait<0>();
      finish(even, sum, turn, b);
    }
  }

 private:
  __device__ void start(float (&d)[D], int b) {
    full[stage].wait(round & 1);
    const u64 a = operand(ring + stage * TILE_BYTES), x = operand(tokens + b * NT * ROW_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma(d, a + 2 * k, x + 2 * k, k);
    wgmma_commit();
    if (++stage == stages) stage = 0, round++;
  }

  __device__ void finish(const float (&d)[D], float (&sum)[D], int turn, int b) {
    if (threadIdx.x % 32 == 0) empty[done].arrive();
    if (++done == stages) done = 0;
    const float by = own[turn * count + b];
#pragma unroll
    for (int i = 0; i < D; i += 4) {
      const float2 s = *reinterpret_cast<const float2*>(scale + b * NT + 2 * i + column());
      sum[i] = fmaf(d[i], s.x * by, sum[i]), sum[i + 1] = fmaf(d[i + 1], s.y * by, sum[i + 1]);
      sum[i + 2] = fmaf(d[i + 2], s.x * by, sum[i + 2]), sum[i + 3] = fmaf(d[i + 3], s.y * by, sum[i + 3]);
    }
  }
};

template <int NT, class T>
__device__ __forceinline__ void linear_fp8(const Product<T>& p, const Share& at) {
  DYNAMIC_SHARED(__align__(1024) u8, memory);
  __shared__ Barrier full[MOST_STAGES], empty[MOST_STAGES], inbox_full[MOST_INBOXES];
  const int rank = cluster_rank(), size = cluster_size();
  const int cluster = at.block / size, group = cluster % p.groups, step = at.blocks / size / p.groups;
  const int height = p.tiles / p.groups, top = cluster / p.groups;  // tiles of a group, and the first of them here
  const int first = rank * p.blocks / size, last = (rank + 1) * p.blocks / size, count = last - first;
  const int most = (p.blocks + size - 1) / size;  // of all segments: what lies where is the same in all blocks
  const int turns = (height - top + step - 1) / step;  // tiles of this cluster
  const auto tile_of = [&](int turn) { return group * height + top + turn * step; };
  const auto column_of = [&](int token) { return (static_cast<i64>(token) * p.groups + group) * p.blocks + first; };
  u8* const tokens = memory + p.stages * TILE_BYTES;                              // [most][NT][128]
  float* const scale = reinterpret_cast<float*>(tokens + most * NT * ROW_BYTES);  // [most][NT]
  float* const inbox = scale + most * NT;                                         // [inboxes][size][64][NT]
  float* const own = inbox + (size > 1 ? (turns + size - 1) / size * size * TILE_ROWS * NT : 0);  // [turns][most]
  Columns<NT> columns{full, empty, memory, tokens, scale, own, p.stages, first, count};
  pdl_trigger();
  if (threadIdx.x == 0) {
    columns.begin();
    for (int i = 0; i < MOST_INBOXES; i++) {
      inbox_full[i].init(1);
      inbox_full[i].arrive_expecting(size * TILE_ROWS * NT * 4);
    }
    fence_barriers();
  }
  if (size > 1) {
    meet_cluster();
  } else {
    __syncthreads();
  }
  if (threadIdx.x >= WORKERS) {
    if (threadIdx.x == WORKERS) columns.feed(p.weight, turns, tile_of);
    pdl_wait();
    return;
  }
  columns.scales(p.weight_scale, p.blocks, turns, tile_of);
  pdl_wait();
  columns.bring(p.x, p.x_scale, p.tokens, column_of);
  constexpr int D = NT / 2;
  const int row = columns.row(), column = columns.column();
  for (int turn = 0; turn < turns; turn++) {
    const int tile = tile_of(turn);
    float sum[D];
    columns.sums(sum, turn);
    const i64 rows = static_cast<i64>(p.tiles) * TILE_ROWS;
    if (size == 1) {
#pragma unroll
      for (int i = 0; i < D; i++) {
        const int t = i / 4 * 8 + column + i % 2, r = row + i / 2 % 2 * 8;
        if (t < p.tokens) p.y[t * rows + tile * TILE_ROWS + r] = narrow<T>(sum[i]);
      }
      continue;
    }
    const int leader = turn % size, box = turn / size;
    float* const to = inbox + (box * size + rank) * TILE_ROWS * NT;
    const auto barrier = in_peer(&inbox_full[box], leader);
#pragma unroll
    for (int i = 0; i < D; i += 2)
      send8(in_peer(to + (row + i / 2 % 2 * 8) * NT + i / 4 * 8 + column, leader), make_float2(sum[i], sum[i + 1]), barrier);
    if (leader != rank) continue;
    inbox_full[box].wait_cluster(0);
    for (int i = threadIdx.x; i < TILE_ROWS * p.tokens; i += WORKERS) {
      const int r = i % TILE_ROWS, t = i / TILE_ROWS;
      float all = 0;
      for (int from = 0; from < size; from++) all += inbox[((box * size + from) * TILE_ROWS + r) * NT + t];
      p.y[t * rows + tile * TILE_ROWS + r] = narrow<T>(all);
    }
  }
}

}  // namespace e4m3_few
