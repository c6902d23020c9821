// What the mHC kernels share: the order of sums of the mix, the way back, and the sums over ranges.
//
// Order of a mix (one number of `fn @ streams` for one token), whichever kernel computes it:
//   - the columns are cut into ranges of 256; a range has all streams of its columns;
//   - lane l of a warp has columns 4 l .. 4 l + 3 of both halves (128 columns) of the range, and adds products by FMA:
//     half after half, in a half stream after stream, column after column;
//   - the lanes are added in pairs 16, 8, 4, 2, 1 apart;
//   - range r goes to adder r mod 16, which adds its ranges in ascending order; the adders are added 8, 4, 2, 1 apart.
// It depends on the shape of the row alone. The sum of squares is summed likewise, as one more row of fn.
// A partial sum has its place at partial[(token * ranges + range) * (n + 1) + row]; row n is the sum of squares.
#pragma once
#include "common/reduce.cuh"
#include "common/sinkhorn.cuh"

namespace mhc {

constexpr int RANGE = 256;
constexpr int QUADS = RANGE / 4;
constexpr int MOST = 16;  // streams
constexpr int MOST_ROWS = MOST * (MOST + 2);  // of fn

__device__ __forceinline__ int ranges_of(int d) { return (d + RANGE - 1) / RANGE; }

__device__ __forceinline__ float dot(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// Eight columns of a row, or zeros. d is a multiple of 8 here, so that eight are there or none.
template <class T>
__device__ __forceinline__ Raw8<T> load_eight(const T* p, bool there) {
  Raw8<T> raw = {};
  if (there) load_whole(raw, p);
  return raw;
}

// Four neighbouring columns. d is a multiple of 8, so that a quad is whole or not there.
__device__ __forceinline__ float4 load_quad(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ float4 load_quad(const bf16* p) {
  const uint2 w = *reinterpret_cast<const uint2*>(p);
  return make_float4(__uint_as_float(w.x << 16), __uint_as_float(w.x & 0xFFFF0000u), __uint_as_float(w.y << 16),
                     __uint_as_float(w.y & 0xFFFF0000u));
}
__device__ __forceinline__ void store_quad(float* p, float4 v) { *reinterpret_cast<float4*>(p) = v; }
__device__ __forceinline__ void store_quad(bf16* p, float4 v) {
  *reinterpret_cast<uint2*>(p) = make_uint2(bf16x2(v.x, v.y), bf16x2(v.z, v.w));
}

template <class T>
__device__ __forceinline__ float4 rounded_quad(float4 v) {
  return make_float4(rounded<T>(v.x), rounded<T>(v.y), rounded<T>(v.z), rounded<T>(v.w));
}

__device__ __forceinline__ float2 load_pair(const float* p) { return *reinterpret_cast<const float2*>(p); }
__device__ __forceinline__ float2 load_pair(const bf16* p) {
  const u32 w = *reinterpret_cast<const u32*>(p);
  return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xFFFF0000u));
}
__device__ __forceinline__ void store_pair(float* p, float2 v) { *reinterpret_cast<float2*>(p) = v; }
__device__ __forceinline__ void store_pair(bf16* p, float2 v) { *reinterpret_cast<u32*>(p) = bf16x2(v.x, v.y); }

__device__ __forceinline__ float2 scaled_sum(float by, float2 a, float2 sum) {
  return make_float2(fmaf(by, a.x, sum.x), fmaf(by, a.y, sum.y));
}
__device__ __forceinline__ float4 scaled_sum(float by, float4 a, float4 sum) {
  return make_float4(fmaf(by, a.x, sum.x), fmaf(by, a.y, sum.y), fmaf(by, a.z, sum.z), fmaf(by, a.w, sum.w));
}

// A stream of some columns on the way back: post y + sum_j comb(j) stream(j), not yet rounded.
template <class Columns, class Comb, class Stream>
__device__ __forceinline__ Columns written_back(Columns y, float post, int m, Comb comb, Stream stream) {
  Columns sum = {};
#pragma unroll
  for (int j = 0; j < m; j++) sum = scaled_sum(comb(j), stream(j), sum);
  return scaled_sum(post, y, sum);
}

// Four sums over the lanes, each as `warp_sum` adds them, in 6 shuffles instead of 20: lane 8 r gets that of v[r].
__device__ __forceinline__ float sum_lanes_4(const float (&v)[4]) {
  const int lane = threadIdx.x & 31;
  const bool upper = lane & 16, odd = lane & 8;
  const float first = (upper ? v[2] : v[0]) + __shfl_xor_sync(ALL_LANES, upper ? v[0] : v[2], 16);
  const float second = (upper ? v[3] : v[1]) + __shfl_xor_sync(ALL_LANES, upper ? v[1] : v[3], 16);
  float sum = (odd ? second : first) + __shfl_xor_sync(ALL_LANES, odd ? first : second, 8);
#pragma unroll
  for (int apart = 4; apart; apart /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, apart);
  return sum;
}

// The sums over all ranges of rows 0 .. n, from the partial sums of one token (at most 32 ranges: two to an adder). All
// `warps` of a block work, two rows a warp and turn.
struct RangeSums {
  int ranges, n, warps, adder, row;
  const float* from;

  __device__ RangeSums(const float* partial, int ranges, int n, int warps) : ranges(ranges), n(n), warps(warps) {
    adder = threadIdx.x % 16, row = threadIdx.x / 32 * 2 + threadIdx.x % 32 / 16;
    from = partial + adder * (n + 1) + row;
  }

  __device__ void prefetch() const {
    if (row <= n && adder < ranges) prefetch_line(from);
  }

  __device__ float load(int more) const {
    const bool there = row + more <= n;
    const float first = there && adder < ranges ? from[more] : 0;
    return first + (there && adder + 16 < ranges ? from[16 * (n + 1) + more] : 0);
  }

  // To shared memory; `first`: load(0). A barrier has to follow.
  __device__ void store(float first, float* sums) const {
    for (int more = 0;;) {
#pragma unroll
      for (int apart = 8; apart; apart /= 2) first += __shfl_xor_sync(ALL_LANES, first, apart);
      if (adder == 0 && row + more <= n) sums[row + more] = first;
      more += 2 * warps;
      if (row - row % 2 + more > n) break;
      first = load(more);
    }
  }
};

// What `ordered_sum` adds up, of at most 32 numbers behind which zeros follow: all are loaded before the first is used.
__device__ __forceinline__ float ordered_sum_32(const float (&parts)[32], int count) {
  float4 v[8];
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = *reinterpret_cast<const float4*>(parts + 4 * i);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (4 * i >= count) break;
    sum = sum + v[i].x + v[i].y + v[i].z + v[i].w;
  }
  return sum;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

}  // namespace mhc
