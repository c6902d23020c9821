// Scores, weights and values of a tile of up to 64 heads: a group of four warps has a stream of chunks and, as its block, half
// the columns. So scores of a chunk are sums of what two groups of two blocks have found.
#pragma once
#include "common/attend_rows.cuh"
#include "common/peers.cuh"
#include "common/wgmma_bf16.cuh"

namespace attend {

constexpr int HEADS = 64;                       // rows of a warpgroup's product
constexpr int MOST_RING = 3, MOST_STAGES = 4;   // chunks in shared memory, as they are stored and as BF16
constexpr int NAMED = 4, LISTED = 8;            // whose rows have names, and of which is known what is listed
constexpr int SLOTS = 2;                        // strands that a stream keeps at most
constexpr int PITCH = COLUMNS + 8;              // floats from head to head of values, so that no two lanes meet in a bank
constexpr int GROUPS = 2, GROUP = WORKERS / GROUPS;
constexpr int SHARE = 16, SHARES = COLUMNS / 2 / SHARE;  // of a thread's values: those that one product is made for
constexpr float LOG2E = 0x1.715476p+0f, SCALE = 0x1.6a09e6p-5f * LOG2E;  // 512^-0.5, to powers of two
enum Meeting { OF_FEEDERS = 1, OF_WORKERS };
using Share = Registers<FEEDERS, WORKERS, 56, 200>;

struct alignas(16) Counted {
  Barrier barrier;
};

// Chunks in shared memory, as BF16 and as they are stored.
struct Rings {
  int stages, ring;
};

// Shared memory. Behind it: both rings, what the other block sends, the strands but the last of each stream. When all chunks
// are through, the last strands take the place of the rings.
struct Memory {
  Names names[NAMED];
  alignas(16) u8 scales[MOST_RING][CHUNK][SCALES];
  alignas(16) u32 listed[LISTED][2];    // a bit for each row
  float2 state[SLOTS][GROUPS][HEADS];   // of each strand: the largest score, and the sum of weights relative to it
  Counted brought[MOST_RING], widened[MOST_RING], full[MOST_STAGES], empty[MOST_STAGES], sent[GROUPS], read[GROUPS];
  alignas(16) u32 said[GROUPS][4];      // by the other block, when it has read
  alignas(1024) u8 queries[BOXES * BOX];

  __device__ u8* kv(int stage) { return reinterpret_cast<u8*>(this + 1) + stage * (BOXES * BOX); }
  __device__ Stored* stored(const Rings& rings) { return reinterpret_cast<Stored*>(kv(rings.stages)); }
  __device__ float4* received(const Rings& rings, int group, int wide) {
    return reinterpret_cast<float4*>(stored(rings) + rings.ring) + group * 16 * wide;  // [8][2 * wide]
  }
  __device__ float* of(int slot, int slots, int group, const Rings& rings, int wide) {
    const bool last = slot + 1 >= slots;
    float* const from = reinterpret_cast<float*>(last ? kv(0) : reinterpret_cast<u8*>(received(rings, GROUPS, wide)));
    return from + ((last ? 0 : slot) * GROUPS + group) * wide * PITCH;
  }
};
static_assert(sizeof(Memory) % 1024 == 0);

// The score of a row that is not there.
__device__ __forceinline__ float nothing() { return __uint_as_float(0xFF800000u); }

__device__ __forceinline__ float power(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// What a weight relative to `from` is worth relative to `to`.
__device__ __forceinline__ float decay(float from, float to) { return from == nothing() ? 0.0f : power(from - to); }

// Registers as wgmma_bf16.cuh has them: a lane has heads `head()` and the eighth behind it.
struct Tile {
  float values[SHARES][SHARE], top[2], sum[2];  // so far, relative to `top`

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int t() { return threadIdx.x % 4; }
  __device__ static int group() { return threadIdx.x / GROUP; }
  __device__ static int thread() { return threadIdx.x % GROUP; }
  __device__ static int first() { return threadIdx.x % GROUP / 32 * 16; }  // head of the warp
  __device__ static int head() { return first() + threadIdx.x % 32 / 4; }
  __device__ static bool works(int wide) { return first() < wide; }  // the warp's heads are there

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < SHARES; i++)
#pragma unroll
      for (int j = 0; j < SHARE; j++) values[i][j] = 0;
    top[0] = top[1] = nothing(), sum[0] = sum[1] = 0;
  }

  // The block's part of a chunk's scores.
  __device__ static void score(float (&s)[32], const u8* queries, const u8* kv) {
    const u64 a = of_warp(operand_at(shared_address(queries))), b = of_warp(operand_at(shared_address(kv)));
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < COLUMNS / 16; i++)
      wgmma_bf16(s, operand_beyond(a, i / 4 * BOX + i % 4 * 32), operand_beyond(b, i / 4 * BOX + i % 4 * 32), i);
    wgmma_commit();
    wgmma_wait<0>();
  }

  // To the same thread of the other block, when that has read what was sent before, and from there: the sum of both.
  __device__ static void exchange(float (&s)[32], Memory& memory, int turn, const Rings& rings, int wide) {
    if (!works(wide)) return;
    Barrier &sent = memory.sent[group()].barrier, &read = memory.read[group()].barrier;
    float4* const own = memory.received(rings, group(), wide) + thread();
    const int peer = cluster_rank() ^ 1;
    if (turn) {
      read.wait_cluster((turn - 1) % 2);
      if (thread() == 0) read.arrive_expecting(wide / 4);
    }
    const auto to = in_peer(own, peer), done = in_peer(&sent, peer);
#pragma unroll
    for (int i = 0; i < 8; i++)
      send16(to + i * 32 * wide, make_float4(s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]), done);
    sent.wait_cluster(turn % 2);
    if (thread() == 0) sent.arrive_expecting(256 * wide);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float4 other = own[i * 2 * wide];
      s[4 * i] += other.x, s[4 * i + 1] += other.y, s[4 * i + 2] += other.z, s[4 * i + 3] += other.w;
    }
    __syncwarp();
    // A number that was read says so itself: it cannot be sent before it is there.
    if (lane() == 0)
      send4(in_peer(memory.said[group()] + thread() / 32, peer), __float_as_uint(s[31]), in_peer(&read, peer));
  }

  // Until the other block has read all that was sent, and has said so: nobody leaves before nothing more is sent to him.
  __device__ static void await_reading(Memory& memory, int turn, int wide) {
    if (turn && works(wide)) memory.read[group()].barrier.wait_cluster((turn - 1) % 2);
  }

  // Weights relative to the chunk's largest score, rounded, as the products take them; and the sum of those that are not. What
  // there is becomes relative to the largest score that is known with this chunk: `kept` is what it is worth, `by` what the
  // chunk's.
  __device__ void weigh(float (&s)[32], u64 listed, u32 (&weights)[4][4], float (&kept)[2], float (&by)[2]) {
    if (~listed) {
#pragma unroll
      for (int i = 0; i < 32; i++)
        if (!(listed >> 2 * t() >> (i / 4 * 8 + i % 2) & 1)) s[i] = nothing();
    }
    float most[2] = {nothing(), nothing()}, all[2] = {};
#pragma unroll
    for (int i = 0; i < 32; i++) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], s[i]);
#pragma unroll
    for (int k = 0; k < 2; k++) {
      most[k] = fmaxf(most[k], __shfl_xor_sync(ALL_LANES, most[k], 1));
      most[k] = fmaxf(most[k], __shfl_xor_sync(ALL_LANES, most[k], 2)) * SCALE;
    }
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const int k = i / 2 % 2;
      const float one = power(fmaf(s[i], SCALE, -most[k])), other = power(fmaf(s[i + 1], SCALE, -most[k]));
      weights[i / 8][i / 4 % 2 * 2 + k] = bf16x2(one, other);
      all[k] += one + other;
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
      all[k] += __shfl_xor_sync(ALL_LANES, all[k], 1), all[k] += __shfl_xor_sync(ALL_LANES, all[k], 2);
      const float higher = fmaxf(top[k], most[k]);
      kept[k] = decay(top[k], higher), by[k] = decay(most[k], higher), top[k] = higher;
      sum[k] = fmaf(all[k], by[k], sum[k] * kept[k]);
    }
  }

  // The chunk's values join those so far.
  __device__ void add(const u32 (&weights)[4][4], const float (&kept)[2], const float (&by)[2], const u8* kv) {
    const u64 boxes = of_warp(operand_at(shared_address(kv)));
#pragma unroll
    for (int i = 0; i < SHARES; i++) {
      const int column = i * 2 * SHARE;
      float d[SHARE];
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; step++)
        wgmma_bf16_turned(d, weights[step],
                          operand_beyond(boxes, column / BOX_COLUMNS * BOX + 16 * step * BOX_BYTES + column % BOX_COLUMNS * 2),
                          step);
      wgmma_commit();
#pragma unroll
      for (int j = 0; j < SHARE; j++) values[i][j] *= kept[j / 2 % 2];
      wgmma_wait<0>();
#pragma unroll
      for (int step = 0; step < 4; step++) hold(weights[step]);
#pragma unroll
      for (int j = 0; j < SHARE; j++) values[i][j] = fmaf(d[j], by[j / 2 % 2], values[i][j]);
    }
  }

  // Behind what was laid down by the same threads, which is worth less or the values are.
  __device__ void fold_behind(const float* from, const float2 (&state)[HEADS], int wide) {
    if (!works(wide)) return;
    __syncwarp();
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int one = head() + 8 * k;
      const float2 before = state[one];
      const float higher = fmaxf(before.x, top[k]), kept = decay(before.x, higher), by = decay(top[k], higher);
      top[k] = higher, sum[k] = fmaf(sum[k], by, before.y * kept);
#pragma unroll
      for (int i = 0; i < SHARES; i++)
#pragma unroll
        for (int j = 2 * k; j < SHARE; j += 4) {
          const float2 v = *reinterpret_cast<const float2*>(from + place(one, i, j));
          values[i][j] = fmaf(values[i][j], by, v.x * kept), values[i][j + 1] = fmaf(values[i][j + 1], by, v.y * kept);
        }
    }
    __syncwarp();
  }

  // Where the numbers `j` and `j + 1` of a share lie among the values of a head.
  __device__ static int place(int one, int i, int j) { return one * PITCH + 2 * (i * SHARE + j - j % 4) + 2 * t(); }

  // What a strand, or all of the stream's, came to.
  __device__ void lay(float* to, float2 (&state)[HEADS], int wide) const {
    if (!works(wide)) return;
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int one = head() + 8 * k;
      if (t() == 0) state[one] = make_float2(top[k], sum[k]);
#pragma unroll
      for (int i = 0; i < SHARES; i++)
#pragma unroll
        for (int j = 2 * k; j < SHARE; j += 4)
          *reinterpret_cast<float2*>(to + place(one, i, j)) = make_float2(values[i][j], values[i][j + 1]);
    }
  }
};

}  // namespace attend
