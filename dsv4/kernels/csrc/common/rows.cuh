// The loop that norm, activation quantisers and SwiGLU share: a row is read once into registers, turned into new values
// there, and written as a row, as stored bytes, or as both.
//
// A row belongs to `warps` warps, V chunks of 256 columns to each of them; a block has as many rows as fit. Blocks walk
// over the rows with the stride of the grid and load the next row before they work on this one. The numbers of warps,
// chunks and blocks are the launcher's choice and change no bit of the result.
#pragma once
#include "common/formats.cuh"

constexpr int MOST_CHUNKS = 64;  // of a block's rows together: 16,384 columns

// What the warps of a block tell each other. Two of each, used in turn: one barrier a row then keeps a fast warp of the
// next row from writing what a slow one of this row has not read.
struct Scratch {
  float sums[2][MOST_CHUNKS];
  u32 tops[2][32];
};

// How rows lie on threads: `slots` rows a block, `warps` warps a row.
struct Shape {
  int rows, slots, warps;  // at most 2^30 rows, so that no sum of row numbers overflows
};

// Where a thread stands. `slot`: which of the block's rows; `warp`: which of the row's warps.
struct Place {
  int warps, slot, warp, lane;

  __device__ explicit Place(const Shape& shape) : warps(shape.warps) {
    const u32 all = threadIdx.x / 32;
    slot = shape.slots == 1 ? 0 : all / static_cast<u32>(warps);
    warp = all - slot * warps, lane = threadIdx.x % 32;
  }

  __device__ int chunk(int v) const { return v * warps + warp; }
  __device__ int column(int v) const { return chunk(v) * WARP_COLUMNS + lane * EIGHT; }
};

// The sum over the row of one number a lane and chunk, in the order of the row. All threads of the block call it.
template <int V>
__device__ __forceinline__ float row_sum(const float (&part)[V], const Place& at, float (&sums)[MOST_CHUNKS]) {
  float chunk[V];
#pragma unroll
  for (int v = 0; v < V; v++) chunk[v] = warp_sum(part[v]);
  if (at.warps == 1) {  // nobody to tell
    float sum = 0;
#pragma unroll
    for (int v = 0; v < V; v++) sum += chunk[v];
    return sum;
  }
  const int first = at.slot * at.warps * V;
#pragma unroll
  for (int v = 0; v < V; v++)
    if (at.lane == 0) sums[first + at.chunk(v)] = chunk[v];
  __syncthreads();
  return ordered_sum(sums + first, at.warps * V);
}

// The largest over the row of one magnitude a lane.
__device__ __forceinline__ u32 row_max(u32 top, const Place& at, u32 (&tops)[32]) {
  top = group_max<32>(top);
  if (at.warps == 1) return top;
  const int first = at.slot * at.warps;
  if (at.lane == 0) tops[first + at.warp] = top;
  __syncthreads();
  return group_max<32>(at.lane < at.warps ? tops[first + at.lane] : 0);
}

// Nothing but the row itself, which its source has written.
struct Kept {
  __device__ void begin() {}
  template <int V>
  __device__ void write(const float (&)[V][8], const Place&, int, bool, u32 (&)[32]) const {}
};

// Rows of n columns, of numbers that T holds.
template <class T>
struct Dense {
  T* y;
  int n;

  __device__ void begin() {}
  template <int V>
  __device__ void write(const float (&v)[V][8], const Place& at, int row, bool live, u32 (&)[32]) const {
    const bool wide = aligned(y, static_cast<i64>(n) * static_cast<int>(sizeof(T)), 16);
#pragma unroll
    for (int i = 0; i < V; i++)
      if (live) store8(y + static_cast<i64>(row) * n + at.column(i), v[i], n - at.column(i), wide);
  }
};

// Stored bytes. `total`: the global scale that NVFP4 is given, null for 1. `own`: where each row's own global scale goes,
// null unless rows have one.
template <class Format>
struct Quantized {
  Stored to;
  const float* total;
  float* own;
  float given;

  __device__ void begin() { given = total ? *total : 1.0f; }

  template <int V>
  __device__ void write(const float (&v)[V][8], const Place& at, int row, bool live, u32 (&tops)[32]) const {
    // A row past the last: its lanes take part in the shuffles and store nothing.
    const int past = live ? 0 : to.n;
    if constexpr (Format::GLOBAL) {
      float scale = given;
      u32 amax[V];
#pragma unroll
      for (int i = 0; i < V; i++) amax[i] = Format::block_max(v[i]);
      if (float* const owner = opaque(own)) {
        u32 top = 0;
#pragma unroll
        for (int i = 0; i < V; i++) top = max(top, Format::counted(amax[i]));
        scale = nvfp4_global(row_max(top, at, tops));
        if (live && at.warp == 0 && at.lane == 0) owner[row] = scale;
      }
#pragma unroll
      for (int i = 0; i < V; i++) Format::store(v[i], amax[i], scale, to, row, at.column(i) + past);
    } else {
#pragma unroll
      for (int i = 0; i < V; i++) Format::store(v[i], given, to, row, at.column(i) + past);
    }
  }
};

template <int V, class Source, class Target>
__device__ __forceinline__ void run_rows(Source source, Target target, const Shape& shape, Scratch& scratch) {
  const Place at(shape);
  pdl_trigger();
  source.constants(at);
  pdl_wait();
  target.begin();
  const int step = gridDim.x * shape.slots;
  typename Source::Raw next[V] = {};
  // The first round loads only: so the code of a load stands once. What decides is the same for the whole block.
  int first = static_cast<int>(blockIdx.x) * shape.slots - step;
  for (int turn = -1; first < shape.rows; turn = (turn + 1) & 1, first += step) {
    float v[V][8];
    source.widened(v, next);
    if (first + step < shape.rows) source.load(next, at, min(first + step + at.slot, shape.rows - 1));
    if (turn < 0) continue;
    const int row = first + at.slot;
    source.values(v, at, row, row < shape.rows, scratch.sums[turn]);
    target.write(v, at, row, row < shape.rows, scratch.tops[turn]);
  }
}
