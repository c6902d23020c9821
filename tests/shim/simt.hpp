// What a SIMT-only .cu needs so that g++ compiles it for the host, unchanged: words, vector types, intrinsics.
// Threads of a block are fibers of one OS thread (fibers.hpp), or OS threads under ThreadSanitizer (threads.hpp).
#pragma once
#include <bit>
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>
#ifdef SIMT_THREADS
#include <barrier>
#include <condition_variable>
#include <mutex>
#include <thread>
#endif

// Every standard header is above: some of these words have another meaning in them.
#define DSV4_SHIM 1
#define __global__ inline __attribute__((noinline))  // one that is not asked for costs no compilation
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// One section holds all static shared memory, so that it can be filled with poison before each block. A variable in a
// template would need a section of its own: declare shared arrays in the kernels and hand references down.
#define __shared__ static __attribute__((section("simt_shared")))
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(simt::dynamic_shared())

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

#define SIMT_VECTOR(base, name, bytes)                                          \
  struct alignas(2 * bytes) name##2 { base x, y; };                             \
  struct name##3 { base x, y, z; };                                             \
  struct alignas(4 * bytes > 16 ? 16 : 4 * bytes) name##4 { base x, y, z, w; }; \
  inline name##2 make_##name##2(base x, base y) { return {x, y}; }              \
  inline name##3 make_##name##3(base x, base y, base z) { return {x, y, z}; }   \
  inline name##4 make_##name##4(base x, base y, base z, base w) { return {x, y, z, w}; }
SIMT_VECTOR(float, float, 4)
SIMT_VECTOR(int, int, 4)
SIMT_VECTOR(unsigned, uint, 4)
SIMT_VECTOR(unsigned short, ushort, 2)
SIMT_VECTOR(unsigned char, uchar, 1)
#undef SIMT_VECTOR

namespace simt {

#ifdef SIMT_THREADS
#define SIMT_LOCAL thread_local
#else
#define SIMT_LOCAL
#endif

enum class Exchange { idx, up, down, lane_xor, ballot, sync };

struct Request {  // one lane at a warp-wide instruction
  Exchange kind;
  unsigned mask;
  std::uint64_t value;
  int operand;
  int width;
  std::uint64_t answer;
};

void* dynamic_shared();
void* dynamic_shared_of(unsigned rank);
void block_barrier();
unsigned cluster_rank();
unsigned cluster_size();
void cluster_barrier();
unsigned epoch();  // another number for each block or cluster that runs: what a broken one has left behind is known by it
void give_way();
std::uint64_t exchange(Request request);
[[noreturn]] void fail(const char* what);

// The lane of its own segment that a lane reads, as the instruction defines it; itself where that lies outside.
inline int source_lane(const Request& r, int lane) {
  const int first = lane & ~(r.width - 1), last = first + r.width - 1;
  int from = lane;
  if (r.kind == Exchange::idx) from = first + (r.operand & (r.width - 1));
  if (r.kind == Exchange::up) from = lane - r.operand < first ? lane : lane - r.operand;
  if (r.kind == Exchange::down) from = lane + r.operand > last ? lane : lane + r.operand;
  if (r.kind == Exchange::lane_xor) from = (lane ^ r.operand) > last ? lane : lane ^ r.operand;
  return from;
}

// All lanes of `group` have arrived: give each its answer. False where they did not come to the same instruction.
inline bool answer(Request* lanes, unsigned group) {
  unsigned votes = 0;
  const Request& first = lanes[std::countr_zero(group)];
  for (int lane = 0; lane < 32; lane++) {
    if (!(group >> lane & 1)) continue;
    if (lanes[lane].kind != first.kind || lanes[lane].mask != first.mask) return false;
    votes |= unsigned(lanes[lane].value != 0) << lane;
  }
  for (int lane = 0; lane < 32; lane++) {
    if (!(group >> lane & 1)) continue;
    const int from = source_lane(lanes[lane], lane);
    if (!(group >> from & 1)) return false;  // a lane that takes no part has no value
    lanes[lane].answer = first.kind == Exchange::ballot ? votes : lanes[from].value;
  }
  return true;
}

template <class T>
T shuffle(Exchange kind, unsigned mask, T value, int operand, int width) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Request request{kind, mask, 0, operand, width, 0};
  std::memcpy(&request.value, &value, sizeof(T));
  const std::uint64_t found = exchange(request);
  std::memcpy(&value, &found, sizeof(T));
  return value;
}

}  // namespace simt

inline SIMT_LOCAL dim3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0};
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

inline void __syncthreads() { simt::block_barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { simt::exchange({simt::Exchange::sync, mask, 0, 0, 32, 0}); }
template <class T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32) {
  return simt::shuffle(simt::Exchange::idx, mask, v, lane, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  return simt::shuffle(simt::Exchange::up, mask, v, int(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  return simt::shuffle(simt::Exchange::down, mask, v, int(delta), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32) {
  return simt::shuffle(simt::Exchange::lane_xor, mask, v, lanes, width);
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  return unsigned(simt::exchange({simt::Exchange::ballot, mask, std::uint64_t(vote != 0), 0, 32, 0}));
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, !vote) == 0; }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __trap() { simt::fail("__trap()"); }
template <class T>
T atomicAdd(T* p, T v) {
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
inline unsigned __activemask() = delete;  // says nothing that a kernel may rely on

// Arithmetic. -ffp-contract=off keeps plain operators apart as well; the compiler of the device may fuse those.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline void sincospi(double a, double* sine, double* cosine) { *sine = std::sin(M_PI * a), *cosine = std::cos(M_PI * a); }
inline unsigned __float_as_uint(float a) { return std::bit_cast<unsigned>(a); }
inline int __float_as_int(float a) { return std::bit_cast<int>(a); }
inline float __uint_as_float(unsigned a) { return std::bit_cast<float>(a); }
inline float __int_as_float(int a) { return std::bit_cast<float>(a); }
// Byte i of the result is that of eight which nibble i of `pick` numbers; bit 3 of a nibble repeats the sign instead.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned pick) {
  const std::uint64_t all = std::uint64_t(high) << 32 | low;
  unsigned found = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned byte = all >> 8 * (pick >> 4 * i & 7) & 255;
    found |= (pick >> 4 * i & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return found;
}
inline int __popc(unsigned a) { return std::popcount(a); }
inline int __clz(int a) { return std::countl_zero(unsigned(a)); }
inline int __clzll(long long a) { return std::countl_zero(static_cast<unsigned long long>(a)); }
inline int __ffs(int a) { return a ? std::countr_zero(unsigned(a)) + 1 : 0; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class A, class B>
constexpr auto min(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(b) < C(a) ? C(b) : C(a);
}
template <class A, class B>
constexpr auto max(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(a) < C(b) ? C(b) : C(a);
}
