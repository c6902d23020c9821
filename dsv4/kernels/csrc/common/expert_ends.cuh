// What becomes of the sums of the experts' matrices: SwiGLU and the second matrix' input, or results.
#pragma once
#include "common/expert_list.cuh"
#include "common/expert_work.cuh"
#include "common/swiglu.cuh"

// Row 2 h of the weights is gate h, row 2 h + 1 up h: a thread has both, for eight hidden columns a warp. The 128 columns
// that share a scale are those of a task; where it has two pieces, the first one's wait where bytes will be `staged`.
template <class F>
struct Swiglu {
  float limit;
  const float* weight;  // [groups, NT]
  u8* hidden;           // [groups, heights, NT * 128]: x of the second matrix
  float* scale;         // [groups, heights, NT]
  uint4 (*tops)[4];     // shared: of each token, the largest of each warp of the pieces
  uint4* staged;        // shared, [NT][128 bytes]
  u32 kept[F::NT / 8];  // of the last piece

  template <int D>
  __device__ __forceinline__ void piece(int number, const float (&sum)[D], const Task& task, const Lane& lane) {
    static_assert(F::PIECES <= 2, "there is room for one piece to wait");
    const bool waits = number + 1 < F::PIECES;
    if (waits) meet<F::WORKERS>(1);  // all have copied the bytes of the task before
#pragma unroll
    for (int j = 0; j < D / 4; j++) {
      const int token = 8 * j + 2 * lane.t;
      const float2 w = *reinterpret_cast<const float2*>(weight + static_cast<i64>(task.group) * F::NT + token);
      float v[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float gate = round_bf16(sum[4 * j + i]), up = round_bf16(sum[4 * j + 2 + i]);
        v[i] = round_bf16(swiglu(gate, up, limit) * (i ? w.y : w.x));
        u32 top = magnitude(v[i]);
#pragma unroll
        for (int other = 4; other < 32; other *= 2) top = max(top, __shfl_xor_sync(ALL_LANES, top, other));
        if (lane.g == 0) reinterpret_cast<u32*>(tops[token + i])[number * F::WARPS + lane.warp] = top;
      }
      kept[j] = bf16x2(v[0], v[1]);
      if (waits) reinterpret_cast<u32*>(staged)[j * F::WORKERS + threadIdx.x] = kept[j];
    }
  }

  template <int D>
  __device__ __forceinline__ void done(const Work& m, const Task& task, const Lane& lane) {
    u32 pairs[F::PIECES][D / 4];
#pragma unroll
    for (int j = 0; j < D / 4; j++) {
      if (F::PIECES > 1) pairs[0][j] = reinterpret_cast<const u32*>(staged)[j * F::WORKERS + threadIdx.x];
      pairs[F::PIECES - 1][j] = kept[j];
    }
    meet<F::WORKERS>(1);
#pragma unroll
    for (int i = 0; i < D / 2; i++) {
      const int token = i / 2 * 8 + 2 * lane.t + i % 2;
      u32 top = 0;
#pragma unroll
      for (int w = 0; w < 4; w++) {
        const uint4 four = tops[token][w];
        top = max(max(max(four.x, four.y), max(four.z, four.w)), top);
      }
      const bool broken = top >= INFINITY_BITS;
      const u32 byte = Fp8Row::scale_byte(top);
#pragma unroll
      for (int q = 0; q < F::PIECES; q++) {
        // Column h: word h / 4 = 8 t + p goes to piece p, word t.
        const int column = 8 * (q * F::WARPS + lane.warp) + lane.g, p = column / 4 % 8;
        const float v = bf16_float(i % 2 ? pairs[q][i / 2] >> 16 : pairs[q][i / 2] & 0xFFFF);
        reinterpret_cast<u8*>(staged)[token * ROW_BYTES + 16 * (p ^ (token & 7)) + column / 32 * 4 + column % 4] =
            broken ? 0 : static_cast<u8>(e4m3(v * __uint_as_float((254 - byte) << 23)));
        if (column == 0)
          scale[(static_cast<i64>(task.group) * m.heights + task.height) * F::NT + token] =
              ue8m0_float(broken ? UE8M0_NAN : byte);
      }
    }
    meet<F::WORKERS>(1);
    u8* const to = hidden + (static_cast<i64>(task.group) * m.heights + task.height) * F::TOKEN_BYTES;
    for (int i = threadIdx.x; i < 2 * D * 8; i += F::WORKERS) reinterpret_cast<uint4*>(to)[i] = staged[i];
  }
};

template <class F>
struct Results {
  const int* pair;  // [groups, NT]
  bf16* y;          // [pairs, rows]
  i64 rows;

  template <int D>
  __device__ __forceinline__ void piece(int, const float (&sum)[D], const Task& task, const Lane& lane) const {
    bf16* const to = y + task.height * 64 * F::GROUPS + 16 * lane.warp + 2 * lane.g;
#pragma unroll
    for (int j = 0; j < D / 4; j++) {
      const int2 who =
          *reinterpret_cast<const int2*>(pair + static_cast<i64>(task.group) * F::NT + 8 * j + 2 * lane.t);
      if (who.x >= 0) *reinterpret_cast<u32*>(to + who.x * rows) = bf16x2(sum[4 * j], sum[4 * j + 2]);
      if (who.y >= 0) *reinterpret_cast<u32*>(to + who.y * rows) = bf16x2(sum[4 * j + 1], sum[4 * j + 3]);
    }
  }
  template <int D>
  __device__ __forceinline__ void done(const Work&, const Task&, const Lane&) const {}
};

// The same for few tokens, and their sums: whoever comes last with some rows of the results adds up those of all experts.
template <class F>
struct Summed {
  Results<F> results;
  const List& list;
  int tokens, ways;
  int* arrived;  // [heights]
  bf16* out;     // [tokens, rows]
  int* last;     // shared

  template <int D>
  __device__ __forceinline__ void piece(int number, const float (&sum)[D], const Task& task, const Lane& lane) const {
    results.piece(number, sum, task, lane);
  }
  template <int D>
  __device__ __forceinline__ void done(const Work&, const Task& task, const Lane&) const {
    meet<F::WORKERS>(1);
    if (threadIdx.x == 0) {
      __threadfence();
      *last = atomicAdd(arrived + task.height, 1) == list.total - 1;
      __threadfence();
    }
    meet<F::WORKERS>(1);
    if (!*last) return;
    constexpr int WORDS = 32 * F::GROUPS;  // of two numbers
    for (int i = threadIdx.x; i < tokens * WORDS; i += F::WORKERS) {
      const i64 token = i / WORDS, column = task.height * (2 * WORDS) + i % WORDS * 2;
      u32 pairs[MOST_CHOICES + 1];
#pragma unroll
      for (int e = 0; e <= MOST_CHOICES; e++)  // all on their way at once
        if (e < ways)
          pairs[e] = load_fresh(reinterpret_cast<const int*>(results.y + (token * ways + e) * results.rows + column));
      float low = 0, high = 0;
#pragma unroll
      for (int e = 0; e <= MOST_CHOICES; e++) {
        if (e >= ways) break;
        const float first = bf16_float(pairs[e] & 0xFFFF), second = bf16_float(pairs[e] >> 16);
        low = e ? low + first : first, high = e ? high + second : second;
      }
      *reinterpret_cast<u32*>(out + token * results.rows + column) = bf16x2(low, high);
    }
  }
};
