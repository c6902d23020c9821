// In place of csrc/common/stream.cuh on the host: barriers that count bytes, and copies that are over at once.
#pragma once
#include "common/device.cuh"

inline u64 shared_address(const void* p) { return reinterpret_cast<u64>(p); }
inline u64 kept_address(const void* p) { return shared_address(p); }
inline u32 load_shared4(u64 at) { return *reinterpret_cast<const u32*>(at); }
inline uint2 load_shared8(u64 at) { return *reinterpret_cast<const uint2*>(at); }
inline uint4 load_shared16(u64 at) { return *reinterpret_cast<const uint4*>(at); }

struct Barrier {
  int count, missing, bytes;
  u32 phase;

  void init(int threads) { count = missing = threads, bytes = 0, phase = 0; }
  void arrive() { missing--, turn(); }
  void arrive_expecting(int more) { bytes += more, arrive(); }
  void came(int some) { bytes -= some, turn(); }
  void wait(u32 parity) {
    while ((phase & 1) == parity) simt::give_way();
  }

 private:
  void turn() {
    if (missing < 0) simt::fail("more threads at a barrier than it counts");
    if (!missing && !bytes) missing = count, phase++;
  }
};

inline void arrive_at(u64 barrier) { reinterpret_cast<Barrier*>(barrier)->arrive(); }
inline void wait_at(u64 barrier, u32 parity) { reinterpret_cast<Barrier*>(barrier)->wait(parity); }
inline void fence_barriers() {}
inline void fence_shared() {}
inline u64 evict_first() { return 0; }

template <int THREADS>
void meet(int number) {
  static int here[16], turns[16];
  const int turn = turns[number];
  if (++here[number] == THREADS) {
    here[number] = 0, turns[number]++;
  } else {
    while (turns[number] == turn) simt::give_way();
  }
}

inline void copy_run(void* to, const void* from, int bytes, Barrier& done) {
  if ((reinterpret_cast<u64>(to) | reinterpret_cast<u64>(from) | bytes) & 15) simt::fail("a copy that is not aligned");
  std::memcpy(to, from, bytes);
  done.came(bytes);
}
inline void copy_run(void* to, const void* from, int bytes, Barrier& done, u64) { copy_run(to, from, bytes, done); }
