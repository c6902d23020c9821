// Words that mean the same on the device and behind the host shim, and launch helpers that are no-ops there.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr u32 ALL_LANES = 0xFFFFFFFFu;

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

// Wait until all that the kernels in front have written can be read. What stands before it may read constants alone, and
// write nothing. No-op where the launch does not overlap. Every thread calls it, also one that has no work: the kernel
// behind us relies on it that those in front of us are done when we are.
__device__ __forceinline__ void pdl_wait() {
#ifdef __CUDA_ARCH__
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The kernel behind may be launched as soon as all our blocks have come here; it waits itself for what we write.
__device__ __forceinline__ void pdl_trigger() {
#ifdef __CUDA_ARCH__
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#ifdef __CUDA_ARCH__
// This block's place in its cluster, which one of the grid that is, and how many blocks it has.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ int cluster_number() {
  int number;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(number));
  return number;
}
__device__ __forceinline__ int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// All threads of all blocks of the cluster: what was written before is seen behind it.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
#endif

// 16 bytes that are read once: they take no place in the first cache. Not .nc: the bytes may be written by a kernel that
// still runs when we start.
__device__ __forceinline__ uint4 load16_once(const void* p) {
#ifdef __CUDA_ARCH__
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
#else
  return *static_cast<const uint4*>(p);
#endif
}

// Loads that stay where the text has them: the compiler moves others behind what has room for fewer registers.
__device__ __forceinline__ i64 load8_once(const i64* p) {
#ifdef __CUDA_ARCH__
  i64 v;
  asm volatile("ld.global.s64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
#else
  return *p;
#endif
}

__device__ __forceinline__ float load4_once(const float* p) {
#ifdef __CUDA_ARCH__
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
#else
  return *p;
#endif
}

// Not by way of the first cache, which may hold what stood there before.
__device__ __forceinline__ int load_fresh(const int* p) {
#ifdef __CUDA_ARCH__
  int v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
#else
  return *p;
#endif
}

__device__ __forceinline__ int4 load_fresh(const int4* p) {
#ifdef __CUDA_ARCH__
  int4 v;
  asm volatile("ld.relaxed.gpu.global.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
#else
  return *p;
#endif
}

// The words of pair `at` of the numbers at p.
__device__ __forceinline__ uint2 load_pair(const float* p, u32 at) {
  const uint2* const from = reinterpret_cast<const uint2*>(p) + at;
#ifdef __CUDA_ARCH__
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from) : "memory");
  return v;
#else
  return *from;
#endif
}

// Brings the line of an address into the second cache, where it is already or will be written. In front of a wait this
// makes the compiler compute the address there and not behind it, and warms up its translation. It reads nothing.
__device__ __forceinline__ void prefetch_line(const void* p) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p) : "memory");
#endif
}

// Whether `p` and every address a whole number of `stride` bytes from it is a multiple of `bytes`, a power of two.
__device__ __forceinline__ bool aligned(const void* p, i64 stride, int bytes) {
  return ((reinterpret_cast<u64>(p) | static_cast<u64>(stride)) & (bytes - 1)) == 0;
}

// The same pointer, of which the compiler knows nothing: it does not write a loop twice, with it and without.
template <class T>
__device__ __forceinline__ T* opaque(T* p) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(p));
#endif
  return p;
}

// The same number, likewise; what was known of it has not to be kept.
__device__ __forceinline__ u32 opaque(u32 x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// How the feeders of a block, whole warpgroups, and its workers divide the registers that it starts with: a feeder keeps LOW,
// and a worker takes HIGH, for which it waits until they have been given up.
template <int FEEDERS, int WORKERS, int LOW, int HIGH>
struct Registers {
  static constexpr int EACH = 65536 / (FEEDERS + WORKERS) / 8 * 8;  // at the start
  static_assert(FEEDERS * LOW + WORKERS * HIGH <= (FEEDERS + WORKERS) * EACH, "the last warpgroup would wait forever");
  static __device__ __forceinline__ void give() {
#ifdef __CUDA_ARCH__
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LOW));
#endif
  }
  static __device__ __forceinline__ void take() {
#ifdef __CUDA_ARCH__
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(HIGH));
#endif
  }
};
