// Bytes that a later kernel reads, on their way into the second cache.
//
// Moves   what it is given, once, while something runs that asks little of the memory.
// Form    a lane asks for 4 KiB, and waits for none of it.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/device.cuh"

extern "C" __global__ void __launch_bounds__(32) prefetch(const u8* from, i64 bytes) {
  constexpr i64 EACH = 4096;
  const i64 at = (static_cast<i64>(blockIdx.x) * 32 + threadIdx.x) * EACH;
  if (at >= bytes) return;
#ifdef __CUDA_ARCH__
  const u32 count = static_cast<u32>(bytes - at < EACH ? bytes - at : EACH) & ~15u;
  if (count) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from + at), "r"(count) : "memory");
#endif
}
