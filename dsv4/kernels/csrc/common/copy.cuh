// Copies from global to shared memory that go on while the thread does other things. At once, behind the host shim.
#pragma once
#include "common/device.cuh"

// 16 bytes; both addresses are multiples of 16.
__device__ __forceinline__ void copy16_async(void* shared, const void* global) {
#ifdef __CUDA_ARCH__
  const u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

// 16 bytes, 8 or 4; zeros unless `there`, and then nothing is read.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool there) {
  static_assert(BYTES == 16 || BYTES == 8 || BYTES == 4);
#ifdef __CUDA_ARCH__
  const u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
  const int bytes = there ? BYTES : 0;
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(bytes) : "memory");
  }
#else
  for (int i = 0; i < BYTES / 4; i++) static_cast<u32*>(shared)[i] = there ? static_cast<const u32*>(global)[i] : 0;
#endif
}

// What was begun since the last time becomes a group; then until all groups but the last LEFT are there.
__device__ __forceinline__ void copies_commit() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int LEFT>
__device__ __forceinline__ void copies_wait() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// Until all that this thread has begun is there. Other threads see it after a barrier.
__device__ __forceinline__ void copies_done() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
