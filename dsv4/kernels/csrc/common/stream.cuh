// Tiles of weights on their way from memory through a ring in shared memory into the tensor cores of sm_90a.
#pragma once
#include "common/device.cuh"

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// The same, once: of an address that it can find again the compiler keeps nothing, and finds it at every turn of a loop.
__device__ __forceinline__ u32 kept_address(const void* p) {
  u32 at = shared_address(p);
  asm volatile("" : "+r"(at));
  return at;
}

__device__ __forceinline__ u32 load_shared4(u32 at) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}

__device__ __forceinline__ uint2 load_shared8(u32 at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
  return v;
}

__device__ __forceinline__ uint4 load_shared16(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}

__device__ __forceinline__ void arrive_at(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait_at(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A barrier of shared memory: it completes its phase when `count` threads have arrived and all announced bytes have come.
struct Barrier {
  u64 word;

  __device__ void init(int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&word)), "r"(count) : "memory");
  }
  __device__ void arrive() { arrive_at(shared_address(&word)); }
  // As soon as all that this thread copies by cp.async is there.
  __device__ void arrive_with_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&word)) : "memory");
  }
  // So that who waits by `wait_cluster` sees what was written before: a fence of hundreds of cycles.
  __device__ void release_at(int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(shared_address(&word)),
        "r"(rank)
        : "memory");
  }
  __device__ void arrive_expecting(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&word)), "r"(bytes)
                 : "memory");
  }
  __device__ void wait(u32 parity) { wait_at(shared_address(&word), parity); }
  // For what other blocks of the cluster have released.
  __device__ void wait_cluster(u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(&word)),
        "r"(parity)
        : "memory");
  }
};

// After `init`, before another proxy or block uses the barriers.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Until THREADS threads of the block have come, of whole warps, each with this number.
template <int THREADS>
__device__ __forceinline__ void meet(int number) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(THREADS) : "memory");
}

// What threads wrote to shared memory becomes visible to copies and tensor cores.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Weights are read once a step: they are the first to leave the second cache.
__device__ __forceinline__ u64 evict_first() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copy a run of bytes; addresses and count are multiples of 16. Its bytes count at the barrier. One thread does it.
__device__ __forceinline__ void copy_run(void* to, const void* from, int bytes, Barrier& done) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&done.word))
               : "memory");
}

__device__ __forceinline__ void copy_run(void* to, const void* from, int bytes, Barrier& done, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(&done.word)), "l"(policy)
      : "memory");
}

// A matrix in memory as the copy engine of sm_90 sees it, made by the host (dsv4/kernels/tiles.py).
struct alignas(64) TensorMap {
  u8 bytes[128];
};

// Copy the box whose first element is (column, row); its bytes count at the barrier. One thread does it.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, int column, int row, Barrier& done, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<u64>(&map)), "r"(column), "r"(row), "r"(shared_address(&done.word)), "l"(policy)
      : "memory");
}

// The same for what is read again.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, int column, int row, Barrier& done) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(reinterpret_cast<u64>(&map)), "r"(column), "r"(row), "r"(shared_address(&done.word))
      : "memory");
}

// The other way: a box from shared memory, less what lies beyond the matrix. The thread that stores it commits, and waits
// until all but the last LEFT groups that it committed have been read, or until all have been written.
__device__ __forceinline__ void store_box(const TensorMap& map, int column, int row, const void* from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
                   reinterpret_cast<u64>(&map)),
               "r"(column), "r"(row), "r"(shared_address(from))
               : "memory");
}
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}
__device__ __forceinline__ void stores_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
