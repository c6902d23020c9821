// The matrices of the experts, routed and shared together: weights packed for it (dsv4/quant/packed.py), E4M3 tokens.
//
// A block takes a piece of the rows of a matrix for up to NT tokens of one expert (a group), then the next piece that is
// due to it. One thread copies tiles of the piece into a ring, another one the tokens' columns. Each warpgroup multiplies
// 64 rows: the weights go from shared memory through registers, where FP4 becomes E4M3, into the tensor cores, the tokens
// from shared memory. The sums of 128 columns are scaled and added in FP32, column by column. So a token's bits are its
// own whatever NT, the pieces and its company.
#pragma once
#include "common/expert_ends.cuh"

constexpr int MOST_STAGES = 12;

// Stages of the ring. Tokens come first: their tiles begin at multiples of 1,024 bytes. RESIDENT: those of all columns
// are there from the beginning, the same ones for every task.
template <class F, class K, bool RESIDENT>
struct Ring {
  static constexpr int SLOT = F::GROUPS * (K::QUARTER > PackedFp8::QUARTER ? K::QUARTER : PackedFp8::QUARTER);
  Barrier *full, *empty;
  const void* table;
  u8 *tokens, *weights;
  float* scales;

  __device__ Ring(u8* memory, Barrier* full, Barrier* empty, const void* table, const Work& m)
      : full(full), empty(empty), table(table), tokens(memory),
        weights(memory + (RESIDENT ? m.blocks : m.stages) * F::TOKEN_BYTES),
        scales(reinterpret_cast<float*>(weights + m.stages * SLOT)) {}
};

// One thread copies the weights, another one the tokens and their scales, each as far ahead as the ring allows.
template <bool LISTED, class Copy>
__device__ __forceinline__ void fill(const Work& m, Barrier* full, Barrier* empty, const Copy& copy) {
  Cursor<LISTED> at(m);
  for (int stage = 0, round = 0; at.more; at.next()) {
    if (round) empty[stage].wait((round - 1) & 1);
    copy(at, stage);
    if (++stage == m.stages) stage = 0, round++;
  }
}

// Where in the ring a warp is.
struct Turn {
  int stage = 0, round = 0;
};

// What a thread multiplies at a time: the words of its rows, and the scales of their sums.
template <class K>
struct Words {
  u32 a[K::TERMS][4][4];
  float by[2];
};

// The sums over all columns, of rows 16 warp + 2 g and the one behind it: sum[4 j], sum[4 j + 1] are those of tokens
// 8 j + 2 t and the one behind it, sum[4 j + 2] and sum[4 j + 3] the second row's.
template <class K, class F, class R, bool RESIDENT, int D>
struct Product {
  static constexpr int SLOT = Ring<F, R, RESIDENT>::SLOT;
  const decltype(kept_address(nullptr)) tokens, scales, quarter, table, filled, emptied;
  const Work& m;
  const Lane& lane;
  Turn& turn;

  __device__ __forceinline__ Product(const Ring<F, R, RESIDENT>& ring, const Work& m, const Lane& lane, Turn& turn)
      : tokens(kept_address(ring.tokens)), scales(kept_address(ring.scales) + 8 * lane.t),
        quarter(kept_address(ring.weights) + lane.warp / 4 * K::QUARTER), table(kept_address(ring.table)),
        filled(kept_address(ring.full)), emptied(kept_address(ring.empty)), m(m), lane(lane), turn(turn) {}

  __device__ __forceinline__ void read(const Turn& at, bool apart, int pass, Words<K>& to) const {
    wait_at(filled + at.stage * sizeof(Barrier), at.round & 1);
    K::read(quarter + at.stage * SLOT, table, lane, apart, pass, to.a, to.by);
  }

  // 128 columns, number b; `meanwhile` runs while the tensor cores multiply. last: nobody needs them again.
  template <class Meanwhile>
  __device__ __forceinline__ void add(float (&sum)[D], const Words<K>& now, int b, bool last, const Meanwhile& meanwhile) {
    const int place = RESIDENT ? b : turn.stage;
    const u64 x = operand_at(tokens + place * F::TOKEN_BYTES);
    float part[D];
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4 * K::TERMS; i++) wgmma(part, now.a[i / 4][i % 4], x | 2 * (i % 4), i);
    wgmma_commit();
    Turn next = turn;
    if (last && ++next.stage == m.stages) next.stage = 0, next.round++;
    meanwhile(next);
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < 4 * K::TERMS; i++) hold(now.a[i / 4][i % 4]);
#pragma unroll
    for (int i = 0; i < D; i += 4) {
      const uint2 scale = load_shared8(scales + (place * F::NT + 2 * i) * 4);
      const float s[2] = {__uint_as_float(scale.x), __uint_as_float(scale.y)};
#pragma unroll
      for (int j = 0; j < 4; j++) sum[i + j] = fmaf(part[i + j], s[j % 2] * now.by[j / 2], sum[i + j]);
    }
    if (last) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) arrive_at(emptied + turn.stage * sizeof(Barrier));
    }
    turn = next;
  }
};

// Where there are MANY tokens the next words are widened while the tensor cores multiply, two turns written out so that none
// change registers; elsewhere a stage is given back the sooner for not waiting for more. A tile that stands `apart` is gone
// through as often as it has scales.
template <class K, class F, class R, bool RESIDENT, int D>
__device__ __forceinline__ void multiply(float (&sum)[D], const Ring<F, R, RESIDENT>& ring, const Work& m, bool apart,
                                         const Lane& lane, Turn& turn) {
  Product<K, F, R, RESIDENT, D> product(ring, m, lane, turn);
#pragma unroll
  for (int i = 0; i < D; i++) sum[i] = 0;
  if constexpr (F::MANY && K::AHEAD) {
    if (!apart) {
      Words<K> one, other;
      product.read(turn, false, 0, one);
#pragma unroll 1
      for (int b = 0; b < m.blocks; b += 2) {
        product.add(sum, one, b, true, [&](const Turn& next) {
          if (b + 1 < m.blocks) product.read(next, false, 0, other);
        });
        if (b + 1 == m.blocks) break;
        product.add(sum, other, b + 1, true, [&](const Turn& next) {
          if (b + 2 < m.blocks) product.read(next, false, 0, one);
        });
      }
      return;
    }
  }
  const int end = apart ? K::PASSES - 1 : 0;
  int pass = 0;
#pragma unroll 1
  for (int b = 0; b < m.blocks;) {
    Words<K> now;
    product.read(turn, apart, pass, now);
    product.add(sum, now, b, pass == end, [](const Turn&) {});
    if (pass == end) {
      pass = 0, b++;
    } else {
      pass++;
    }
  }
}

// All pieces of a task, for 2 D tokens of its group.
template <int D, class F, class K, bool RESIDENT, class End>
__device__ __forceinline__ void work(const Work& m, const Ring<F, K, RESIDENT>& ring, const Task& task, const Lane& lane,
                                     Turn& turn, End& end) {
#pragma unroll 1
  for (int piece = 0; piece < m.span; piece++) {
    const Rows rows = Rows::of(m, task, piece, F());
    float sum[D];
    if (rows.shared) {
      multiply<PackedFp8>(sum, ring, m, false, lane, turn);
    } else {
      multiply<K>(sum, ring, m, m.routed.apart[rows.tile], lane, turn);
    }
    end.piece(piece, sum, task, lane);
  }
  end.template done<D>(m, task, lane);
}

// K: the format of the routed experts.
template <class F, class K, bool LISTED, bool RESIDENT, class End>
__device__ __forceinline__ void run(const Work& m, const Ring<F, K, RESIDENT>& ring, End& end) {
  constexpr int SLOT = Ring<F, K, RESIDENT>::SLOT;
  const int warp = threadIdx.x / 32;
  if (warp >= F::WARPS) {
    if constexpr (F::MANY) F::Share::give();
    if (warp == F::WARPS && threadIdx.x % 32 == 0) {
      const u64 once = evict_first();
      fill<LISTED>(m, ring.full, ring.empty, [&](const Cursor<LISTED>& at, int stage) {
        const Rows rows = Rows::of(m, at.task, at.piece, F());
        const int quarter = rows.shared ? PackedFp8::QUARTER : K::QUARTER, bytes = F::GROUPS * quarter;
        const u8* const tiles = rows.shared ? m.shared.tiles : m.routed.tiles;
        const u8* const from = tiles + (rows.tile * m.blocks + at.block) * (4 * quarter) + rows.piece * bytes;
        ring.full[stage].arrive_expecting(bytes);
        if (F::NT == 8) {
          copy_run(ring.weights + stage * SLOT, from, bytes, ring.full[stage], once);
        } else {
          copy_run(ring.weights + stage * SLOT, from, bytes, ring.full[stage]);
        }
      });
    }
    if (!RESIDENT && warp == F::WARPS + 1 && threadIdx.x % 32 == 0) {
      pdl_wait();
      fill<LISTED>(m, ring.full, ring.empty, [&](const Cursor<LISTED>& at, int stage) {
        const i64 from = static_cast<i64>(at.task.group) * m.blocks + at.block;
        ring.full[stage].arrive_expecting(F::TOKEN_BYTES + 4 * F::NT);
        copy_run(ring.tokens + stage * F::TOKEN_BYTES, m.x + from * F::TOKEN_BYTES, F::TOKEN_BYTES, ring.full[stage]);
        copy_run(ring.scales + stage * F::NT, m.x_scale + from * F::NT, 4 * F::NT, ring.full[stage]);
      });
    }
    return;
  }
  if constexpr (F::MANY) F::Share::take();
  pdl_wait();
  const Lane lane;
  Task task;
  Turn turn;
  for (int i = blockIdx.x; find<LISTED>(task, m, i, F::NT); i += gridDim.x) {
    if (F::MANY && task.tokens <= F::NT / 2) {
      work<F::MANY ? F::D / 2 : F::D>(m, ring, task, lane, turn, end);
    } else {
      work<F::D>(m, ring, task, lane, turn, end);
    }
  }
}

// Before `run`: the tables that weights are widened by, and the barriers.
template <class F, class K, bool RESIDENT>
__device__ __forceinline__ void begin(const Ring<F, K, RESIDENT>& ring, const Work& m, typename K::Entry* table) {
  for (int i = threadIdx.x; i < K::ENTRIES; i += blockDim.x) table[i] = K::entry(i);
  if (threadIdx.x == F::WORKERS) {
    for (int i = 0; i < m.stages; i++) ring.full[i].init(RESIDENT ? 1 : 2), ring.empty[i].init(F::WARPS);
    fence_barriers();
  }
  __syncthreads();
}

#define EXPERTS_GIVEN                                                                                                 \
  const u8 *routed, const int *apart, const u8 *shared, const u8 *x, const float *x_scale, const int *group,          \
      const int *total, int experts, int most, int heights, int blocks, int stages
#define EXPERTS_WORK(SPAN)                                                                                            \
  const Work m{{routed, apart}, {shared, nullptr}, experts, x, x_scale, reinterpret_cast<const int4*>(group),         \
               total,           most,              heights, SPAN, blocks, stages}
#define EXPERTS_MEMORY(K)                                                                                             \
  DYNAMIC_SHARED(__align__(1024) u8, memory);                                                                         \
  __shared__ K::Entry table[K::ENTRIES];                                                                              \
  __shared__ Barrier full[MOST_STAGES], empty[MOST_STAGES]

// The tokens lie in groups (csrc/expert_tokens.cu).
#define EXPERTS_LISTED(name, K, NT, GROUPS, THREADS)                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                            \
      experts_##name##_up_##NT(EXPERTS_GIVEN, float limit, const float* weight, u8* hidden, float* scale) {           \
    EXPERTS_MEMORY(K);                                                                                                \
    __shared__ uint4 tops[NT][4], staged[NT * ROW_BYTES / 16];                                                        \
    using F = Form<NT, GROUPS>;                                                                                       \
    EXPERTS_WORK(F::PIECES);                                                                                          \
    const Ring<F, K, false> ring(memory, full, empty, table, m);                                                      \
    Swiglu<F> end{limit, weight, hidden, scale, tops, staged};                                                        \
    begin(ring, m, table);                                                                                            \
    run<F, K, true, false>(m, ring, end);                                                                             \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                            \
      experts_##name##_down_##NT(EXPERTS_GIVEN, const int* pair, bf16* y) {                                           \
    EXPERTS_MEMORY(K);                                                                                                \
    using F = Form<NT, GROUPS>;                                                                                       \
    EXPERTS_WORK(1);                                                                                                  \
    const Ring<F, K, false> ring(memory, full, empty, table, m);                                                      \
    Results<F> end{pair, y, static_cast<i64>(heights) * 64 * GROUPS};                                                 \
    begin(ring, m, table);                                                                                            \
    run<F, K, true, false>(m, ring, end);                                                                             \
  }

#define EXPERTS_CHOSEN                                                                                                \
  const u8 *routed, const int *apart, const u8 *shared, const i64 *chosen, const float *route, const u8 *x
#define EXPERTS_FEW_WORK(x, x_scale, SPAN)                                                                            \
  __shared__ List list;                                                                                               \
  make_list(list, chosen, route, tokens, k, experts);                                                                 \
  const Work m{{routed, apart}, {shared, nullptr}, experts, x, x_scale, list.group, &list.total, MOST_LISTED, heights, \
               SPAN,            blocks,            stages}

// Few tokens: nothing in front of these and nothing behind.
#define EXPERTS_FEW(name, K, UP, UP_THREADS, DOWN, DOWN_THREADS)                                                      \
  extern "C" __global__ void __launch_bounds__(UP_THREADS, 1)                                                         \
      experts_##name##_up_few(EXPERTS_CHOSEN, const u8* x_scale, int tokens, int k, int experts, int heights,         \
                              int blocks, int stages, float limit, u8* hidden, float* scale, int* arrived, int most) { \
    EXPERTS_MEMORY(K);                                                                                                \
    __shared__ uint4 tops[FEW][4], staged[FEW * ROW_BYTES / 16];                                                      \
    using F = Form<FEW, UP>;                                                                                          \
    pdl_wait();                                                                                                       \
    pdl_trigger();                                                                                                    \
    EXPERTS_FEW_WORK(nullptr, nullptr, F::PIECES);                                                                    \
    const Ring<F, K, true> ring(memory, full, empty, table, m);                                                       \
    Swiglu<F> end{limit, list.weight[0], hidden, scale, tops, staged};                                                \
    for (int i = threadIdx.x; blockIdx.x == 0 && i < most; i += blockDim.x) arrived[i] = 0;                           \
    begin(ring, m, table);                                                                                            \
    if (threadIdx.x < F::WORKERS) lay_out<F::WORKERS>(ring.tokens, ring.scales, x, x_scale, tokens, blocks);          \
    run<F, K, false, true>(m, ring, end);                                                                             \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(DOWN_THREADS, 4 / DOWN)                                                \
      experts_##name##_down_few(EXPERTS_CHOSEN, const float* x_scale, int tokens, int k, int experts, int heights,    \
                                int blocks, int stages, bf16* y, int* arrived, bf16* out) {                           \
    EXPERTS_MEMORY(K);                                                                                                \
    __shared__ int last;                                                                                              \
    using F = Form<FEW, DOWN>;                                                                                        \
    pdl_trigger();                                                                                                    \
    EXPERTS_FEW_WORK(x, x_scale, 1);                                                                                  \
    const Ring<F, K, false> ring(memory, full, empty, table, m);                                                      \
    Summed<F> end{{list.pair[0], y, static_cast<i64>(heights) * 64 * DOWN}, list, tokens, k + 1, arrived, out, &last}; \
    begin(ring, m, table);                                                                                            \
    run<F, K, false, false>(m, ring, end);                                                                            \
  }

#define EXPERTS(name, K)                                                                                              \
  EXPERTS_FEW(name, K, 4, 576, 2, 320)                                                                                \
  EXPERTS_LISTED(name, K, 8, 4, 576)                                                                                  \
  EXPERTS_LISTED(name, K, 16, 4, 576)                                                                                 \
  EXPERTS_LISTED(name, K, 32, 4, 576)                                                                                 \
  EXPERTS_LISTED(name, K, 128, 2, 384)
