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

// All threads of the cluster have read what they wanted of each other: nothing that was written is seen by it, which takes a
// fence of hundreds of cycles.
__device__ __forceinline__ void leave_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}
