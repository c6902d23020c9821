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

// Until all that this thread has begun is there. Other threads see it after a barrier.
__device__ __forceinline__ void copies_done() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
