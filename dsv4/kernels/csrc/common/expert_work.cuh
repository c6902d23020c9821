// What blocks of the experts' kernels do: which rows of which expert's matrix, for which tokens.
#pragma once
#include "common/expert_formats.cuh"

// NT: tokens of a group. GROUPS: warpgroups that multiply, so 64 GROUPS rows of a piece.
template <int NT_, int GROUPS_>
struct Form {
  static constexpr int NT = NT_, GROUPS = GROUPS_, PIECES = 4 / GROUPS, WARPS = 4 * GROUPS, WORKERS = 32 * WARPS;
  static constexpr int TOKEN_BYTES = NT * ROW_BYTES, D = NT / 2;  // D: sums of a thread
  static constexpr bool MANY = NT >= 128;  // so many that the tensor cores have most to do
  using Share = Registers<128, WORKERS, 40, 232>;
};

struct Matrix {
  const u8* tiles;   // [experts, rows / 256, blocks, 4 quarters]
  const int* apart;  // [experts, rows / 256]
};

struct Work {
  Matrix routed, shared;
  int experts;           // routed ones; the shared one has this number
  const u8* x;           // [groups, blocks, NT * 128]
  const float* x_scale;  // [groups, blocks, NT]
  const int4* group;     // expert, its first group, how many groups and how many tokens it has
  const int* total;      // groups that there are
  int most;              // groups that there is room for
  int heights;           // tasks of a group
  int span;              // pieces of a task
  int blocks, stages;
};

// What a block does at a time: the rows of one height of an expert for one group. Groups of an expert follow each other
// closely, so that its weights are still in the second cache.
struct Task {
  int group, height, expert, tokens;  // tokens: of the expert, from those of this group on
};

// Of number `i`; false if there is none. wide: tokens of a group. Both loads are on their way at once. LISTED: what they read stands in memory.
template <bool LISTED>
__device__ __forceinline__ bool find(Task& task, const Work& m, int i, int wide) {
  const int near = i / m.heights;
  const int4* const at = m.group + min(near, m.most - 1);
  const int4 of = LISTED ? load_fresh(at) : *at;
  if (near >= (LISTED ? load_fresh(m.total) : *m.total)) return false;
  const int further = i - of.y * m.heights;
  task.height = further / of.z, task.group = of.y + further % of.z, task.expert = of.x;
  task.tokens = of.w - further % of.z * wide;
  return true;
}

// Which tile a piece of a task's rows lies in, of [experts, rows / 256], and its place there.
struct Rows {
  i64 tile;
  int piece;
  bool shared;

  template <class F>
  __device__ static Rows of(const Work& m, const Task& task, int piece, F) {
    const int number = task.height * m.span + piece, high = m.heights * m.span / F::PIECES;
    const bool shared = task.expert == m.experts;
    return {static_cast<i64>(shared ? 0 : task.expert) * high + number / F::PIECES, number % F::PIECES, shared};
  }
};

// Where a thread that copies stands.
template <bool LISTED>
struct Cursor {
  const Work& m;
  Task task;
  int number, piece = 0, block = 0;
  bool more;

  __device__ explicit Cursor(const Work& of) : m(of), number(blockIdx.x) { more = find<LISTED>(task, m, number, 0); }
  __device__ void next() {
    if (++block < m.blocks) return;
    block = 0;
    if (++piece < m.span) return;
    piece = 0, number += gridDim.x;
    more = find<LISTED>(task, m, number, 0);
  }
};
