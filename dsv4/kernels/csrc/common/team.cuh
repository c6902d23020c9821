// Blocks of a cluster that work as one: they write words into each other's shared memory, and then meet. A team of one
// block needs no cluster. On the host a team is one block that has the threads of all, and `Scratch` is one of several.
#pragma once
#include "common/device.cuh"

#ifdef __CUDA_ARCH__
constexpr int TEAM_SCRATCHES = 1;  // that a block has
// The scratches of a block, in its dynamic shared memory.
#define TEAM_SHARED(Scratch, name)      \
  DYNAMIC_SHARED(uint4, name##_memory); \
  Scratch* const name = reinterpret_cast<Scratch*>(name##_memory)
#else
constexpr int TEAM_SCRATCHES = 4;
#define TEAM_SHARED(Scratch, name) __shared__ Scratch name[TEAM_SCRATCHES]
#endif

template <int MOST, class Scratch>
struct Team {
  int size, rank;       // blocks, and which of them this is
  int thread, threads;  // of this block
  i64 token;            // one for each team

  __device__ Scratch& scratch(Scratch* all) const { return all[TEAM_SCRATCHES == 1 ? 0 : rank]; }

#ifdef __CUDA_ARCH__
  __device__ explicit Team(int size)
      : size(size), rank(MOST == 1 ? 0 : cluster_rank()), thread(threadIdx.x), threads(blockDim.x),
        token(MOST == 1 ? blockIdx.x : cluster_number()) {}

  // Nothing is written to a block before it has begun: all threads say so, and all wait for it later.
  __device__ void begin() const {
    if (MOST > 1) asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }
  __device__ void begun() const {
    if (MOST > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  }
  __device__ void sync() const { __syncthreads(); }
  __device__ void meet() const {
    if (MOST > 1) {
      meet_cluster();
    } else {
      __syncthreads();
    }
  }

  // `to`: the place in this block's own scratch.
  __device__ void put(u32* to, u32 value, int block) const {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(place(to, block)), "r"(value) : "memory");
  }
  __device__ void put(u64* to, u64 value, int block) const {
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(place(to, block)), "l"(value) : "memory");
  }
  __device__ static u32 place(const void* to, int block) {
    u32 found;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(found)
        : "r"(static_cast<u32>(__cvta_generic_to_shared(to))), "r"(block));
    return found;
  }
#else
  explicit Team(int size)
      : size(size), rank(threadIdx.x / (blockDim.x / size)), thread(threadIdx.x % (blockDim.x / size)),
        threads(blockDim.x / size), token(blockIdx.x) {}
  void begin() const {}
  void begun() const { __syncthreads(); }
  void meet() const { __syncthreads(); }
  void sync() const {
#ifdef SIMT_THREADS
    __syncthreads();
#else  // this block's threads alone
    static int here[TEAM_SCRATCHES], turns[TEAM_SCRATCHES];
    const int turn = turns[rank];
    if (++here[rank] == threads) {
      here[rank] = 0, turns[rank]++;
    } else {
      while (turns[rank] == turn) simt::give_way();
    }
#endif
  }
  template <class Word>
  void put(Word* to, Word value, int block) const {
    *reinterpret_cast<Word*>(reinterpret_cast<char*>(to) + (block - rank) * static_cast<i64>(sizeof(Scratch))) = value;
  }
#endif
};
