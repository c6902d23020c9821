// The product of matrices with a few BF16 tokens, in whole blocks of a launch: csrc/matmul_few.cu says how.
#pragma once
#include "common/copy.cuh"
#include "common/share.cuh"
#include "common/weights.cuh"

namespace bf16_few {

constexpr int NT = 8, WORKERS = 256, MOST_STAGES = 24;

struct Sizes {
  int rows, columns, tokens, groups, parts, stages;  // parts: blocks side by side on tokens
};

// The tiles of a block, one after another, all of a group, and its tokens.
struct Work {
  int group, first, step, turns;  // tiles are counted through all groups
  int start, tokens;
};

// A block's memory. Sums of all chains, of one tile and the next.
struct Memory {
  Barrier* full;
  Barrier* empty;
  u8* ring;     // [stages][SLICE_BOXES][R][128]
  u8* input;    // [boxes][X_BOXES][tokens][128]
  float* sums;  // [2][chains][R][NT]
};

// By one thread, before the others use a barrier.
__device__ __forceinline__ void begin_ring(const Memory& memory, int stages) {
  for (int i = 0; i < stages; i++) memory.full[i].init(1), memory.empty[i].init(1);
}

// The thread of the ring.
template <int R, class W>
__device__ __forceinline__ void feed(const TensorMap& weight, const Sizes& s, const Work& work, const Memory& memory) {
  constexpr int BOX = R * BOX_BYTES, STAGE = SLICE_BOXES * BOX;
  const int boxes = (s.columns + W::COLUMNS - 1) / W::COLUMNS;
  const u64 policy = evict_first();
  int stage = 0, round = 0;
  for (int turn = 0; turn < work.turns; turn++) {
    const int row = (work.first + turn * work.step) * R;
    for (int box = 0; box < boxes; box += SLICE_BOXES) {
      const int count = min(SLICE_BOXES, boxes - box);
      if (round) memory.empty[stage].wait((round - 1) & 1);
      memory.full[stage].arrive_expecting(count * BOX);
      for (int i = 0; i < count; i++)
        copy_box(memory.ring + stage * STAGE + i * BOX, weight, (box + i) * BOX_BYTES, row, memory.full[stage], policy);
      if (++stage == s.stages) stage = 0, round++;
    }
  }
}

// All others. finish(turn, row, token, sum): by a thread for each row of the tile and token, those of a token side by side.
template <int R, class W, class Finish>
__device__ __forceinline__ void multiply(const u8* scale, const bf16* x, i64 stride, const Sizes& s, const Work& work,
                                         const Memory& memory, const Finish& finish) {
  constexpr int BOX = R * BOX_BYTES, STAGE = SLICE_BOXES * BOX, CHAINS = SLICE_BOXES / W::CHAIN;  // of a slice
  const int boxes = (s.columns + W::COLUMNS - 1) / W::COLUMNS, slices = (boxes + SLICE_BOXES - 1) / SLICE_BOXES;
  const int chains = (boxes + W::CHAIN - 1) / W::CHAIN, tokens = work.tokens, apart = tokens * BOX_BYTES;
  for (int i = threadIdx.x; i < boxes * W::X_BOXES * tokens * 8; i += WORKERS) {
    const int box = i / (tokens * 8), t = i / 8 % tokens, piece = i % 8, column = box * BOX_COLUMNS + piece * EIGHT;
    const bool there = column < s.columns;
    const bf16* const from = x + (work.start + t) * stride + static_cast<i64>(work.group) * s.columns + (there ? column : 0);
    copy_async<16>(memory.input + box * apart + t * BOX_BYTES + 16 * (piece ^ (t & 7)), from, there);
  }
  copies_done();
  meet<WORKERS>(1);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int token = min(g, tokens - 1);  // places of tokens that are not there repeat the last: nobody reads their sums
  int count = 0;  // slices of all tiles, one after another
  for (int turn = 0; turn < work.turns; turn++) {
    const int row = (work.first + turn * work.step) * R;
    float* const own = memory.sums + turn % 2 * chains * R * NT;
    for (int slice = 0; slice < slices; slice++, count++) {
      // A stage is always the same warp's: it has seen what came before in it, so a barrier's parity tells it enough.
      const int stage = count % s.stages;
      if (stage % (WORKERS / 32) != warp) continue;
      const int first = slice * SLICE_BOXES, here = min(SLICE_BOXES, boxes - first);
      float by[CHAINS];
#pragma unroll
      for (int c = 0; c < CHAINS; c++)
        by[c] = W::scale(scale, static_cast<i64>(row / SCALE_ROWS) * boxes + min(first + c, boxes - 1));
      const u8* const tile_boxes = memory.ring + stage * STAGE;
      float d[4] = {};
      memory.full[stage].wait(count / s.stages & 1);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < SLICE_BOXES; i++) {
        if (i >= here) break;
        const u8* const w = tile_boxes + i * BOX;
        const u8* const v = memory.input + (first + i) * W::X_BOXES * apart;
        uint4 low[2], high[2];
        bool broken = false;
#pragma unroll
        for (int h = 0; h < 2; h++) {
          low[h] = W::piece(w, g, t, h), high[h] = W::piece(w, R > 8 ? g + 8 : g, t, h);
          broken |= W::broken(low[h], high[h]);
        }
        const auto multiply = [&](bool broken) {
#pragma unroll
          for (int h = 0; h < 2; h++)
#pragma unroll
            for (int j = 0; j < W::X_BOXES; j++)
              mma(d, W::eight(low[h], j, broken), R > 8 ? W::eight(high[h], j, broken) : make_uint4(0, 0, 0, 0),
                  W::tokens(v, apart, token, t, h, j));
        };
        if (__any_sync(ALL_LANES, broken)) {
          multiply(true);
        } else {
          multiply(false);
        }
        if (i % W::CHAIN == W::CHAIN - 1 || i == here - 1) {
          const float times = by[i / W::CHAIN];
          float* const to = own + (first + i) / W::CHAIN * R * NT + g * NT + 2 * t;
          *reinterpret_cast<float2*>(to) = make_float2(d[0] * times, d[1] * times);
          if (R > 8) *reinterpret_cast<float2*>(to + 8 * NT) = make_float2(d[2] * times, d[3] * times);
          d[0] = d[1] = d[2] = d[3] = 0;
        }
      }
      __syncwarp();
      if (lane == 0) memory.empty[stage].arrive();
    }
    meet<WORKERS>(1);  // one a tile: whoever is a tile ahead writes the other half
    static_assert(R * NT <= WORKERS);
    const int number = threadIdx.x % R, of = threadIdx.x / R;
    if (of < tokens) {
      float sum = 0;
#pragma unroll 4
      for (int chain = 0; chain < chains; chain++) sum += own[(chain * R + number) * NT + of];
      finish(turn, row + number, of, sum);
    }
  }
}

// R: 8 or 16 rows of a tile.
template <int R, class W, class T>
__device__ __forceinline__ void matmul_few(const TensorMap& weight, const u8* scale, const bf16* x, i64 stride, T* y,
                                           const Sizes& s, const Share& at) {
  DYNAMIC_SHARED(__align__(1024) u8, shared);
  __shared__ Barrier full[MOST_STAGES], empty[MOST_STAGES];
  const int boxes = (s.columns + W::COLUMNS - 1) / W::COLUMNS, tiles = (s.rows + R - 1) / R / s.groups;
  const int unit = at.block / s.parts, group = unit % s.groups, first = unit / s.groups;
  const int step = at.blocks / s.parts / s.groups, start = at.block % s.parts * NT, tokens = min(NT, s.tokens - start);
  const Work work{group, group * tiles + first, step, (tiles - first + step - 1) / step, start, tokens};
  u8* const input = shared + s.stages * SLICE_BOXES * R * BOX_BYTES;
  float* const sums = reinterpret_cast<float*>(input + boxes * W::X_BOXES * tokens * BOX_BYTES);
  const Memory memory{full, empty, shared, input, sums};
  pdl_trigger();
  if (threadIdx.x == 0) {
    begin_ring(memory, s.stages);
    fence_barriers();
  }
  __syncthreads();
  if (threadIdx.x >= WORKERS) {
    if (threadIdx.x == WORKERS) feed<R, W>(weight, s, work, memory);
    pdl_wait();
    return;
  }
  pdl_wait();
  multiply<R, W>(scale, x, stride, s, work, memory, [&](int, int row, int token, float sum) {
    if (row < s.rows) y[static_cast<i64>(start + token) * s.rows + row] = narrow<T>(sum);
  });
}

}  // namespace bf16_few
