// Blocks of a cluster that hand each other numbers, once an array: stores into each other's shared memory that count
// the bytes at a barrier of the receiver, so that a warp waits for what it needs and no block waits for a whole
// cluster.
#pragma once
#include "common/device.cuh"

#ifdef __CUDA_ARCH__
template <int PHASES>
struct Cluster {
  u64* barriers;  // PHASES of them, in shared memory
  int active;     // the first so many blocks take part

  __device__ static int rank() { return cluster_rank(); }
  __device__ static int size() { return cluster_size(); }

  // Before anything is shared, by all threads of all blocks. bytes: that this block gets, in each phase.
  __device__ void begin(const int (&bytes)[PHASES]) const {
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < PHASES; i++) {
        const u32 at = static_cast<u32>(__cvta_generic_to_shared(barriers + i));
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes[i]) : "memory");
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    meet_cluster();
  }

  // Lane r of a whole warp writes to block r, if that takes part; `to` is the place in this block's own memory.
  __device__ void put(float* to, float value, int phase) const {
    const int lane = threadIdx.x % 32;
    if (lane >= active) return;
    u32 place, barrier;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(place)
        : "r"(static_cast<u32>(__cvta_generic_to_shared(to))), "r"(lane));
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(barrier)
        : "r"(static_cast<u32>(__cvta_generic_to_shared(barriers + phase))), "r"(lane));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(place),
                 "r"(__float_as_uint(value)), "r"(barrier)
                 : "memory");
  }

  // Until all bytes of the phase have come.
  __device__ void await(int phase) const {
    const u32 at = static_cast<u32>(__cvta_generic_to_shared(barriers + phase));
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
        "@!done bra again;\n"
        "}" ::"r"(at)
        : "memory");
  }

  __device__ void pass() const {}
};
#else
// One block on its own, for the host shim: all of it by barriers, which warps that have no part in a phase `pass`.
template <int PHASES>
struct Cluster {
  u64* barriers;
  int active;

  static int rank() { return 0; }
  static int size() { return 1; }
  void begin(const int (&)[PHASES]) const {}
  void put(float* to, float value, int) const {
    if (threadIdx.x % 32 == 0) *to = value;
  }
  void await(int) const { __syncthreads(); }
  void pass() const { __syncthreads(); }
};
#endif
