// Scores, weights and values of a tile of heads, a chunk of rows after another.
#pragma once
#include "common/attend_rows.cuh"

namespace attend {

constexpr int GROUPS = CHUNK / 8;
constexpr int RING = 3;                  // halves of chunks in shared memory as they are stored
constexpr int NAMED = 8, LISTED = 16;    // whose names are there, and of which is known what is listed
constexpr int PITCH = DIMS + 8;          // floats from head to head of values, so that no two lanes meet in a bank
constexpr float SCALE = 0x1.6a09e6p-5f;  // 512^-0.5
enum Meeting { OF_FEEDERS = 1, OF_WORKERS, WITH_WORKERS };  // the last, and the one behind it, of a half of the feeders

// Boxes of queries that registers have room for; the others lie in shared memory. What registers a thread has follows from
// what two compilers (13.0 and 13.5) need for no spills.
template <int HEADS>
constexpr int HELD = HEADS > 16 ? BOXES - 4 : BOXES - 1;
using Share = Registers<FEEDERS, WORKERS, 56, 200>;

// Shared memory of tiles of HEADS heads.
template <int HEADS>
struct Memory {
  Stored raw[RING];
  union {
    u8 kv[2][BOXES * BOX];
    float values[HEADS * PITCH];  // of the last strand of the block: its rows are no longer read
  };
  u8 weights[HEADS * BOX_BYTES], queries[(BOXES - HELD<HEADS>) * HEADS * BOX_BYTES];
  Name names[NAMED][HALF];
  u32 listed[LISTED];  // a bit for each row of half a chunk
  float tops[HEADS][GROUPS], sums[HEADS][GROUPS];
  float2 state[2][HEADS];  // of each strand: the largest score, and the sum of weights relative to it
  alignas(16) float before[1];  // [HEADS * PITCH]: values of the first of two strands

  __device__ float* of(int slot, int slots) { return slot + 1 < slots ? before : values; }
};

// The score of a row that is not there.
__device__ __forceinline__ float nothing() { return __uint_as_float(0xFF800000u); }

// What a weight relative to `from` is worth relative to `to`.
__device__ __forceinline__ float decay(float from, float to) { return from == nothing() ? 0.0f : expf(from - to); }

// The eight numbers of a head's groups.
struct Eight {
  float4 low, high;

  __device__ explicit Eight(const float (&of)[GROUPS])
      : low(reinterpret_cast<const float4*>(of)[0]), high(reinterpret_cast<const float4*>(of)[1]) {}
  __device__ float top() const {
    return fmaxf(fmaxf(fmaxf(low.x, low.y), fmaxf(low.z, low.w)), fmaxf(fmaxf(high.x, high.y), fmaxf(high.z, high.w)));
  }
  __device__ float sum() const {
    return ((((((low.x + low.y) + low.z) + low.w) + high.x) + high.y) + high.z) + high.w;
  }
};

// A warp's share of a tile of 16 M heads: for scores 16 heads and M groups of 8 rows, for values 16 heads and M boxes.
template <int M>
struct Tile {
  static constexpr int HEADS = 16 * M, ACROSS = WORKERS / 32 / M;
  int g, t, lane, head, across;  // head: the first of 16, in the tile
  uint4 low[2 * HELD<HEADS>], high[2 * HELD<HEADS>];  // queries of heads g and g + 8
  float values[M][8][4], top[2], sum[2];  // so far, relative to `top`

  __device__ Tile() : lane(threadIdx.x % 32) {
    const int warp = threadIdx.x / 32;
    g = lane / 4, t = lane % 4, head = warp / ACROSS * 16, across = warp % ACROSS;
    clear();
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int k = 0; k < 4; k++) values[i][j][k] = 0;
    top[0] = top[1] = nothing(), sum[0] = sum[1] = 0;
  }

  // What this lane holds of queries in shared memory, as the first or the second instruction takes it.
  __device__ uint4* shared_query(int i, int of_two, Memory<HEADS>& memory) const {
    const int place = (i - 2 * HELD<HEADS>) * M + head / 16;
    return reinterpret_cast<uint4*>(memory.queries) + (2 * place + of_two) * 32 + lane;
  }

  // q: the tile's first head; `heads` of them are there.
  __device__ void load(const bf16* q, int heads, Memory<HEADS>& memory) {
#pragma unroll
    for (int i = 0; i < 2 * BOXES; i++) {
      const int piece = 2 * t + i % 2, column = i / 2 * BOX_COLUMNS + piece * EIGHT, one = head + g, other = one + 8;
      uint4 a = make_uint4(0, 0, 0, 0), b = a;
      if (one < heads) a = *reinterpret_cast<const uint4*>(q + one * DIMS + column);
      if (other < heads) b = *reinterpret_cast<const uint4*>(q + other * DIMS + column);
      if (i < 2 * HELD<HEADS>) {
        low[i] = a, high[i] = b;
      } else if (across == 0) {
        *shared_query(i, 0, memory) = make_uint4(a.x, b.x, a.y, b.y);
        *shared_query(i, 1, memory) = make_uint4(a.z, b.z, a.w, b.w);
      }
    }
  }

  // Numbers of heads g and g + 8.
  __device__ void query(int i, Memory<HEADS>& memory, uint4& a, uint4& b) const {
    if (i < 2 * HELD<HEADS>) {
      a = low[i], b = high[i];
    } else {
      const uint4 one = *shared_query(i, 0, memory), other = *shared_query(i, 1, memory);
      a = make_uint4(one.x, one.z, other.x, other.z), b = make_uint4(one.y, one.w, other.y, other.w);
    }
  }

  // Scores of the chunk, absent rows with none; each group's largest goes into memory. listed: a bit for each row.
  __device__ void score(float (&s)[M][4], Memory<HEADS>& memory, const u8* kv, u64 listed) const {
    float odd[M][4] = {}, even[M][4] = {};
#pragma unroll
    for (int i = 0; i < 2 * BOXES; i++) {
      uint4 one, other;
      query(i, memory, one, other);
#pragma unroll
      for (int n = 0; n < M; n++)
        mma((i % 2 ? odd : even)[n], one, other, box_piece(kv + i / 2 * BOX, 8 * (across * M + n) + g, 2 * t + i % 2));
    }
#pragma unroll
    for (int n = 0; n < M; n++) {
      const int group = across * M + n;
      const u32 there = static_cast<u32>(listed >> (8 * group + 2 * t));
#pragma unroll
      for (int k = 0; k < 4; k++) s[n][k] = there >> k % 2 & 1 ? (even[n][k] + odd[n][k]) * SCALE : nothing();
#pragma unroll
      for (int k = 0; k < 2; k++) {
        float most = fmaxf(s[n][2 * k], s[n][2 * k + 1]);
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1)), most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
        if (t == 0) memory.tops[head + g + 8 * k][group] = most;
      }
    }
  }

  // Weights relative to the chunk's largest score: rounded into memory, and each group's sum of those that are not.
  __device__ void weigh(const float (&s)[M][4], const float (&most)[2], Memory<HEADS>& memory) const {
#pragma unroll
    for (int n = 0; n < M; n++) {
      const int group = across * M + n;
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const float one = expf(s[n][2 * k] - most[k]), other = expf(s[n][2 * k + 1] - most[k]);
        const int row = head + g + 8 * k;
        *reinterpret_cast<u32*>(memory.weights + row * BOX_BYTES + 16 * (group ^ g) + 4 * t) = bf16x2(one, other);
        float all = one + other;
        all += __shfl_xor_sync(ALL_LANES, all, 1), all += __shfl_xor_sync(ALL_LANES, all, 2);
        if (t == 0) memory.sums[row][group] = all;
      }
    }
  }

  // What there is becomes relative to the largest score that is known with this chunk. by: what the chunk's are worth.
  __device__ void decline(const float (&most)[2], float (&by)[2]) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const float higher = fmaxf(top[k], most[k]), kept = decay(top[k], higher);
      by[k] = decay(most[k], higher), top[k] = higher, sum[k] *= kept;
#pragma unroll
      for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) values[i][j][2 * k] *= kept, values[i][j][2 * k + 1] *= kept;
    }
  }

  // The chunk's values join those so far.
  __device__ void add(const float (&by)[2], const Memory<HEADS>& memory, const u8* kv) {
#pragma unroll
    for (int k = 0; k < 2; k++) sum[k] = fmaf(Eight(memory.sums[head + g + 8 * k]).sum(), by[k], sum[k]);
    u32 weights[4][4];
    const int row = lane % 16, upper = lane / 16;
#pragma unroll
    for (int step = 0; step < 4; step++)
      load_matrices(weights[step], memory.weights + (head + row) * BOX_BYTES + 16 * ((2 * step + upper) ^ (row & 7)));
#pragma unroll
    for (int i = 0; i < M; i++) {
      const u8* const box = kv + (across * M + i) * BOX + row * BOX_BYTES;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        float d[2][4] = {};
#pragma unroll
        for (int step = 0; step < 4; step++) {
          u32 numbers[4];
          load_turned(numbers, box + 16 * step * BOX_BYTES + 16 * ((j + upper) ^ (row & 7)));
          mma16(d[0], weights[step], numbers[0], numbers[1]);
          mma16(d[1], weights[step], numbers[2], numbers[3]);
        }
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int k = 0; k < 4; k++)
            values[i][j + h][k] = fmaf(d[h][k], by[k / 2], values[i][j + h][k]);
      }
    }
  }

  // What a strand came to.
  __device__ void lay(float* to, float2 (&state)[HEADS]) const {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int one = head + g + 8 * k;
      if (across == 0 && t == 0) state[one] = make_float2(top[k], sum[k]);
#pragma unroll
      for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
          *reinterpret_cast<float2*>(to + one * PITCH + (across * M + i) * BOX_COLUMNS + 8 * j + 2 * t) =
              make_float2(values[i][j][2 * k], values[i][j][2 * k + 1]);
    }
  }
};

}  // namespace attend
