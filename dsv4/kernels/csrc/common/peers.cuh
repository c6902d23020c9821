// Numbers in the shared memory of another block of the cluster, at the place where they would lie in ours.
#pragma once
#include "common/stream.cuh"

__device__ __forceinline__ float4 load_from(const float* p, int rank) {
  float4 v;
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n"
      "}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared_address(p)), "r"(rank)
      : "memory");
  return v;
}

__device__ __forceinline__ float2 load_from(const float2* p, int rank) {
  float2 v;
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %2, %3;\n"
      "ld.shared::cluster.v2.f32 {%0, %1}, [there];\n"
      "}"
      : "=f"(v.x), "=f"(v.y)
      : "r"(shared_address(p)), "r"(rank)
      : "memory");
  return v;
}

// The place in another block.
__device__ __forceinline__ u32 in_peer(const void* p, int rank) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(rank));
  return there;
}

// 16 bytes, 8 or 4, to a place in another block; they count at a barrier there.
__device__ __forceinline__ void send16(u32 to, const float4& v, u32 barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "r"(__float_as_uint(v.x)), "r"(__float_as_uint(v.y)), "r"(__float_as_uint(v.z)), "r"(__float_as_uint(v.w)),
               "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void send8(u32 to, const float2& v, u32 barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to),
               "r"(__float_as_uint(v.x)), "r"(__float_as_uint(v.y)), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void send4(u32 to, u32 v, u32 barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(v), "r"(barrier)
               : "memory");
}

// All threads of all blocks begin, and wait later until all have begun: nothing is sent to a block before.
__device__ __forceinline__ void begin_cluster() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void await_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// All threads of the cluster have read what they wanted of each other: nothing that was written is seen by it, which takes a
// fence of hundreds of cycles.
__device__ __forceinline__ void leave_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}
