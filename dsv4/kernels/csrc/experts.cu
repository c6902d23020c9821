// The matrices of the routed experts: MXFP4 weights, packed for it (dsv4/quant/packed.py), and E4M3 tokens.
//
// experts_up    gate and up together, SwiGLU, route weight, and the quantiser of the second matrix
// experts_down  the second matrix
//
// Moves   the weights of all experts that somebody chose, once; all else is small.
// Floor   at 3.08 TB/s: 26 us for the 80.2 MB that one token of Flash takes, both matrices together.
// Form    A block takes 256 rows of weights for up to NT tokens of one expert (a group, csrc/expert_tokens.cu), then the
//         next 256 rows that are due to it. One thread copies tiles of 256 x 128 into a ring, another one the tokens' columns.
//         Each of four warpgroups multiplies 64 rows: the weights go from shared memory through registers, where they
//         are widened to E4M3, into the tensor cores, the tokens from shared memory. The sums of 128 columns are scaled
//         and added in FP32, column by column. So a token's bits are its own whatever NT and its company.
//         In tiles that stand apart the tensor cores sum 32 columns at a time.
// Measured, on an H100, Flash: one token 24 us and 21 us, the whole op 47; 64 tokens 604 and 301, the whole op 910.
// Tried   `experts_down` beside `experts_up`, its first weights on their way when that ends, and all other kernels early
//         too: 68 us for one token, 1,323 for 64. They are launched one after another now (dsv4/kernels/experts.py).
//
// arch: sm_90a
#include "common/formats.cuh"
#include "common/swiglu.cuh"
#include "common/wgmma.cuh"

constexpr int ROWS = 256, COLUMNS = 128, DATA_BYTES = ROWS * COLUMNS / 2, TILE_BYTES = DATA_BYTES + 4 * ROWS;
constexpr int WARPS = 16, WORKERS = 32 * WARPS, MOST_STAGES = 12;
constexpr int UNIT = 8, NOTHING = 15;  // rows of the table: scale 1, and zeros

struct Matrices {
  const u8* weight;     // [experts, heights, blocks, TILE_BYTES]
  const int* apart;     // [experts, heights]
  const u8* x;          // [groups, blocks, NT * 128]
  const float* x_scale; // [groups, blocks, NT]
  const int4* group;    // expert, its first group, how many it has
  const int* total;     // groups that there are
  int most;             // groups that there is room for
  int heights, blocks, stages;
};

// What a block does at a time: the rows of one height of an expert for one group. Groups of an expert follow each other
// closely, so that its weights are still in the second cache.
struct Task {
  int group, height, matrix;  // matrix: of [experts, heights]
};

// Of number `i`; false if there is none. Both loads are on their way at once. What they read was written by a kernel that
// was through before the one in front of us let us start.
__device__ __forceinline__ bool find(Task& task, const Matrices& m, int i) {
  const int near = i / m.heights;
  const int4 of = load_fresh(m.group + min(near, m.most - 1));
  if (near >= load_fresh(m.total)) return false;
  const int further = i - of.y * m.heights;
  task.height = further / of.z, task.group = of.y + further % of.z;
  task.matrix = of.x * m.heights + task.height;
  return true;
}

// Where the thread that copies stands.
struct Cursor {
  const Matrices& m;
  Task task;
  int number, block = 0;
  bool more;

  __device__ explicit Cursor(const Matrices& of) : m(of), number(blockIdx.x) { more = find(task, m, number); }
  __device__ void next() {
    if (++block < m.blocks) return;
    block = 0, number += gridDim.x;
    more = find(task, m, number);
  }
};

// The codes of E2M1 times 2^(step - 8), as E4M3 bytes.
__device__ __forceinline__ uint2 table_of(int step) {
  if (step == NOTHING) return make_uint2(0, 0);
  const float by = __uint_as_float((127 - 8 + step) << 23);
  return make_uint2(e4m3x2(0.0f, 0.5f * by) | e4m3x2(by, 1.5f * by) << 16,
                    e4m3x2(2 * by, 3 * by) | e4m3x2(4 * by, 6 * by) << 16);
}

// Of eight bytes the four that the nibbles of `pick` number, none of them above 7: `__byte_perm` would mask them again.
__device__ __forceinline__ u32 picked(uint2 table, u32 pick) {
#ifdef __CUDA_ARCH__
  u32 found;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(table.x), "r"(table.y), "r"(pick));
  return found;
#else
  return __byte_perm(table.x, table.y, pick);
#endif
}

// Eight codes become two words of E4M3: the magnitudes pick bytes of the table.
__device__ __forceinline__ void widen8(u32 word, uint2 table, u32& first, u32& second) {
  const u32 pick = word & 0x77777777u;
  first = picked(table, pick) | (word & 0x80808080u);
  second = picked(table, pick >> 16) | (word << 4 & 0x80808080u);
}

// One thread copies the weights, another one the tokens and their scales, each as far ahead as the ring allows.
template <class Copy>
__device__ __forceinline__ void fill(const Matrices& m, Barrier* full, Barrier* empty, int bytes, const Copy& copy) {
  Cursor at(m);
  for (int stage = 0, round = 0; at.more; at.next()) {
    if (round) empty[stage].wait((round - 1) & 1);
    full[stage].arrive_expecting(bytes);
    copy(at, stage);
    if (++stage == m.stages) stage = 0, round++;
  }
}

// What a warp of the workers knows of where it is.
struct Lane {
  int warp, g, t;
  __device__ Lane() : warp(threadIdx.x / 32), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {}
};

// The sums over all columns, of rows 16 warp + 2 g and the one behind it: sum[4 j], sum[4 j + 1] are those of tokens
// 8 j + 2 t and the one behind it, sum[4 j + 2] and sum[4 j + 3] the second row's.
template <int NT>
__device__ __forceinline__ void multiply(float (&sum)[NT / 2], const Matrices& m, const Task& task, const Lane& lane,
                                         const u8* ring, const uint2* table, Barrier* full, Barrier* empty,
                                         int& stage, int& round) {
  constexpr int STAGE_BYTES = TILE_BYTES + NT * ROW_BYTES, D = NT / 2;
  const auto start = kept_address(ring), scales = start + m.stages * STAGE_BYTES + 8 * lane.t;
  const auto widening = kept_address(table), filled = kept_address(full), emptied = kept_address(empty);
  const int data = 1024 * lane.warp + 16 * (threadIdx.x % 32), words = DATA_BYTES + 64 * lane.warp + 8 * lane.g;
#pragma unroll
  for (int i = 0; i < D; i++) sum[i] = 0;
  const bool apart = m.apart[task.matrix];
  const int last = apart ? 3 : 0;  // a tile that stands apart is gone through four times
  int pass = 0;
#pragma unroll 1
  for (int b = 0; b < m.blocks;) {
    wait_at(filled + stage * sizeof(Barrier), round & 1);
    const auto tile = start + stage * STAGE_BYTES;
    const uint2 word = load_shared8(tile + words);
    int step[2] = {static_cast<int>(word.x >> 4 * lane.t & 15), static_cast<int>(word.y >> 4 * lane.t & 15)};
    float by[2] = {__uint_as_float(word.x & 0x7F800000u), __uint_as_float(word.y & 0x7F800000u)};
    if (apart) {  // 32 columns, under their own scale
      step[0] = step[1] = lane.t == pass ? UNIT : NOTHING;
      by[0] = ue8m0_float(word.x >> 8 * pass & 255), by[1] = ue8m0_float(word.y >> 8 * pass & 255);
    }
    u32 a[4][4];
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const uint4 packed = load_shared16(tile + data + 512 * row);
      const uint2 widened = load_shared8(widening + 8 * step[row]);
      widen8(packed.x, widened, a[0][row], a[0][2 + row]);
      widen8(packed.y, widened, a[1][row], a[1][2 + row]);
      widen8(packed.z, widened, a[2][row], a[2][2 + row]);
      widen8(packed.w, widened, a[3][row], a[3][2 + row]);
    }
    const u64 x = operand_at(tile + TILE_BYTES);
    float part[D];
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma(part, a[k], x | 2 * k, k);  // tiles begin at 1,024 bytes
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < D; i += 4) {
      const uint2 scale = load_shared8(scales + (stage * NT + 2 * i) * 4);
      const float s[2] = {__uint_as_float(scale.x), __uint_as_float(scale.y)};
#pragma unroll
      for (int j = 0; j < 4; j++) sum[i + j] = fmaf(part[i + j], s[j % 2] * by[j / 2], sum[i + j]);
    }
    if (++pass <= last) continue;
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive_at(emptied + stage * sizeof(Barrier));
    pass = 0, b++;
    if (++stage == m.stages) stage = 0, round++;
  }
}

// Row 2 h of the weights is gate h, row 2 h + 1 up h: a thread has both, for eight hidden columns a warp.
template <int NT>
struct Swiglu {
  float limit;
  const float* weight;  // [groups, NT]
  u8* hidden;           // [groups, heights, NT * 128]: x of the second matrix
  float* scale;         // [groups, heights, NT]
  uint4 (*tops)[WARPS / 4];  // shared: of each token, the largest of each warp
  uint4* staged;             // shared, [NT][128 bytes]

  __device__ void operator()(const float (&sum)[NT / 2], const Matrices& m, const Task& task, const Lane& lane) const {
    float v[NT / 4];
#pragma unroll
    for (int j = 0; j < NT / 8; j++) {
      const int token = 8 * j + 2 * lane.t;
      const float2 w = *reinterpret_cast<const float2*>(weight + static_cast<i64>(task.group) * NT + token);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float gate = round_bf16(sum[4 * j + i]), up = round_bf16(sum[4 * j + 2 + i]);
        v[2 * j + i] = round_bf16(swiglu(gate, up, limit) * (i ? w.y : w.x));
        u32 top = magnitude(v[2 * j + i]);
#pragma unroll
        for (int other = 4; other < 32; other *= 2) top = max(top, __shfl_xor_sync(ALL_LANES, top, other));
        if (lane.g == 0) reinterpret_cast<u32*>(tops[token + i])[lane.warp] = top;
      }
    }
    meet<WORKERS>(1);
    // Column h: word h / 4 = 8 t + p goes to piece p, word t.
    const int column = 8 * lane.warp + lane.g, p = column / 4 % 8, at = column / 32 * 4 + column % 4;
#pragma unroll
    for (int i = 0; i < NT / 4; i++) {
      const int token = i / 2 * 8 + 2 * lane.t + i % 2;
      u32 top = 0;
#pragma unroll
      for (int w = 0; w < WARPS / 4; w++) {
        const uint4 four = tops[token][w];
        top = max(max(max(four.x, four.y), max(four.z, four.w)), top);
      }
      const bool broken = top >= INFINITY_BITS;
      const u32 byte = Fp8Row::scale_byte(top);
      reinterpret_cast<u8*>(staged)[token * ROW_BYTES + 16 * (p ^ (token & 7)) + at] =
          broken ? 0 : static_cast<u8>(e4m3(v[i] * __uint_as_float((254 - byte) << 23)));
      if (column == 0)
        scale[(static_cast<i64>(task.group) * m.heights + task.height) * NT + token] =
            ue8m0_float(broken ? UE8M0_NAN : byte);
    }
    meet<WORKERS>(1);
    u8* const to = hidden + (static_cast<i64>(task.group) * m.heights + task.height) * NT * ROW_BYTES;
    for (int i = threadIdx.x; i < NT * 8; i += WORKERS)
      reinterpret_cast<uint4*>(to)[i] = staged[i];
  }
};

template <int NT>
struct Results {
  const int* pair;  // [groups, NT]
  bf16* y;          // [pairs, rows]

  __device__ void operator()(const float (&sum)[NT / 2], const Matrices& m, const Task& task, const Lane& lane) const {
    const i64 rows = static_cast<i64>(m.heights) * ROWS;
    bf16* const to = y + task.height * ROWS + 16 * lane.warp + 2 * lane.g;
#pragma unroll
    for (int j = 0; j < NT / 8; j++) {
      const int2 who = *reinterpret_cast<const int2*>(pair + static_cast<i64>(task.group) * NT + 8 * j + 2 * lane.t);
      if (who.x >= 0) *reinterpret_cast<u32*>(to + who.x * rows) = bf16x2(sum[4 * j], sum[4 * j + 2]);
      if (who.y >= 0) *reinterpret_cast<u32*>(to + who.y * rows) = bf16x2(sum[4 * j + 1], sum[4 * j + 3]);
    }
  }
};

// EARLY: the kernel in front of us makes the tokens, and we start while it runs: weights first.
template <int NT, bool EARLY, class End>
__device__ __forceinline__ void run(const Matrices& m, u8* ring, uint2 (&table)[16], Barrier* full, Barrier* empty,
                                    const End& end) {
  constexpr int TOKEN_BYTES = NT * ROW_BYTES, STAGE_BYTES = TILE_BYTES + TOKEN_BYTES;
  float* const scales = reinterpret_cast<float*>(ring + m.stages * STAGE_BYTES);
  if (EARLY) pdl_trigger();
  if (threadIdx.x < 16) table[threadIdx.x] = table_of(threadIdx.x);
  if (threadIdx.x == WORKERS) {
    for (int i = 0; i < m.stages; i++) full[i].init(2), empty[i].init(WARPS);
    fence_barriers();
  }
  __syncthreads();
  if (!EARLY) {
    // Whoever starts after us finds the groups: the kernel that makes them is through.
    pdl_wait();
    pdl_trigger();
  }
  if (threadIdx.x / 32 == WARPS) {
    if (threadIdx.x == WORKERS) {
      const u64 once = evict_first();
      fill(m, full, empty, TILE_BYTES, [&](const Cursor& at, int stage) {
        const u8* const from = m.weight + (static_cast<i64>(at.task.matrix) * m.blocks + at.block) * TILE_BYTES;
        u8* const to = ring + stage * STAGE_BYTES;
        if (NT == 8) {
          copy_run(to, from, TILE_BYTES, full[stage], once);
        } else {
          copy_run(to, from, TILE_BYTES, full[stage]);
        }
      });
    }
    if (EARLY) pdl_wait();
    return;
  }
  if (EARLY) pdl_wait();
  if (threadIdx.x / 32 > WARPS) {
    if (threadIdx.x % 32 == 0)
      fill(m, full, empty, TOKEN_BYTES + 4 * NT, [&](const Cursor& at, int stage) {
        const i64 from = static_cast<i64>(at.task.group) * m.blocks + at.block;
        copy_run(ring + stage * STAGE_BYTES + TILE_BYTES, m.x + from * TOKEN_BYTES, TOKEN_BYTES, full[stage]);
        copy_run(scales + stage * NT, m.x_scale + from * NT, 4 * NT, full[stage]);
      });
    return;
  }
  const Lane lane;
  Task task;
  int stage = 0, round = 0;
  for (int i = blockIdx.x; find(task, m, i); i += gridDim.x) {
    float sum[NT / 2];
    multiply<NT>(sum, m, task, lane, ring, table, full, empty, stage, round);
    end(sum, m, task, lane);
  }
}

#define EXPERTS(NT, BLOCKS)                                                                                           \
  extern "C" __global__ void __launch_bounds__(576, BLOCKS) experts_up_##NT(                                          \
      const u8* weight, const int* apart, const u8* x, const float* x_scale, const int* group, const int* total,      \
      int most, int heights, int blocks, int stages, float limit, const float* route, u8* hidden, float* scale) {     \
    DYNAMIC_SHARED(__align__(1024) u8, ring);                                                                         \
    __shared__ uint2 table[16];                                                                                       \
    __shared__ Barrier full[MOST_STAGES], empty[MOST_STAGES];                                                         \
    __shared__ uint4 tops[NT][WARPS / 4], staged[NT * ROW_BYTES / 16];                                                \
    const Matrices m{weight,  apart,  x,     x_scale, reinterpret_cast<const int4*>(group), total, most,             \
                     heights, blocks, stages};                                                                        \
    run<NT, false>(m, ring, table, full, empty, Swiglu<NT>{limit, route, hidden, scale, tops, staged});               \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(576, BLOCKS) experts_down_##NT(                                        \
      const u8* weight, const int* apart, const u8* x, const float* x_scale, const int* group, const int* total,      \
      int most, int heights, int blocks, int stages, const int* pair, bf16* y) {                                      \
    DYNAMIC_SHARED(__align__(1024) u8, ring);                                                                         \
    __shared__ uint2 table[16];                                                                                       \
    __shared__ Barrier full[MOST_STAGES], empty[MOST_STAGES];                                                         \
    const Matrices m{weight,  apart,  x,     x_scale, reinterpret_cast<const int4*>(group), total, most,             \
                     heights, blocks, stages};                                                                        \
    run<NT, true>(m, ring, table, full, empty, Results<NT>{pair, y});                                                 \
  }

// Two blocks of few tokens fit a multiprocessor, so that the second matrix begins to arrive while the first is summed.
EXPERTS(8, 2)
EXPERTS(16, 1)
EXPERTS(32, 1)
