// In place of csrc/common/stream.cuh on the host: barriers that count bytes, and copies that are over at once.
#pragma once
#include "common/copy.cuh"
#include "common/device.cuh"

inline u64 shared_address(const void* p) { return reinterpret_cast<u64>(p); }
inline u64 kept_address(const void* p) { return shared_address(p); }
inline u32 load_shared4(u64 at) { return *reinterpret_cast<const u32*>(at); }
inline uint2 load_shared8(u64 at) { return *reinterpret_cast<const uint2*>(at); }
inline uint4 load_shared16(u64 at) { return *reinterpret_cast<const uint4*>(at); }

struct Barrier;
void late_copies(Barrier& awaited);

struct Barrier {
  int count, missing, bytes;
  u32 phase;

  void init(int threads) { count = missing = threads, bytes = 0, phase = 0; }
  void arrive() { missing--, turn(); }
  void arrive_expecting(int more) { bytes += more, arrive(); }
  void came(int some) { bytes -= some, turn(); }
  void wait(u32 parity) {
    while (late_copies(*this), (phase & 1) == parity) simt::give_way();
  }
  void wait_cluster(u32 parity) { wait(parity); }
  void arrive_with_copies();

 private:
  void turn() {
    if (missing < 0) simt::fail("more threads at a barrier than it counts");
    if (!missing && !bytes) missing = count, phase++;
  }
};

// Copies that say themselves at a barrier when they are made: when somebody waits there, and no earlier.
struct Late {
  Barrier* barrier;
  std::vector<Copy> copies;
};
inline std::vector<Late>& all_late() {
  static std::vector<Late> all;
  static unsigned epoch = 0;
  if (epoch != simt::epoch()) all.clear(), epoch = simt::epoch();
  return all;
}
inline void Barrier::arrive_with_copies() {
  std::vector<std::vector<Copy>>& groups = copy_groups();
  Late late{this, {}};
  for (const std::vector<Copy>& group : groups) late.copies.insert(late.copies.end(), group.begin(), group.end());
  groups.assign(1, {}), all_late().push_back(late);
}
inline void late_copies(Barrier& awaited) {
  std::vector<Late>& all = all_late();
  for (std::size_t i = 0; i < all.size();) {
    if (all[i].barrier != &awaited) {
      i++;
      continue;
    }
    for (const Copy& one : all[i].copies) make(one);
    all.erase(all.begin() + i), awaited.arrive();
  }
}

inline void arrive_at(u64 barrier) { reinterpret_cast<Barrier*>(barrier)->arrive(); }
inline void wait_at(u64 barrier, u32 parity) { reinterpret_cast<Barrier*>(barrier)->wait(parity); }
inline void fence_barriers() {}
inline void fence_shared() {}
inline u64 evict_first() { return 0; }

template <int THREADS>
void meet(int number) {
  static int all_here[16][16], all_turns[16][16];
  static unsigned all_epochs[16][16];
  int &here = all_here[simt::cluster_rank()][number], &turns = all_turns[simt::cluster_rank()][number];
  unsigned& epoch = all_epochs[simt::cluster_rank()][number];
  if (epoch != simt::epoch()) epoch = simt::epoch(), here = 0;
  const int turn = turns;
  if (++here == THREADS) {
    here = 0, turns++;
  } else {
    while (turns == turn) simt::give_way();
  }
}

inline void copy_run(void* to, const void* from, int bytes, Barrier& done) {
  if ((reinterpret_cast<u64>(to) | reinterpret_cast<u64>(from) | bytes) & 15) simt::fail("a copy that is not aligned");
  std::memcpy(to, from, bytes);
  done.came(bytes);
}
inline void copy_run(void* to, const void* from, int bytes, Barrier& done, u64) { copy_run(to, from, bytes, done); }

// As tests/shim makes it of what the driver is asked for: bytes of a row, and from row to row; rows and bytes of a box.
struct alignas(64) TensorMap {
  u64 address, rows, wide, apart, box_rows, box_bytes, unused[10];
};

inline void copy_box(void* to, const TensorMap& map, int column, int row, Barrier& done) {
  if (reinterpret_cast<u64>(to) & 15) simt::fail("a box that is not aligned");
  for (u64 r = 0; r < map.box_rows; r++) {
    for (u64 byte = 0; byte < map.box_bytes; byte++) {
      const u64 y = row + r, x = column + byte;  // what is negative is far beyond
      const u8* const from = reinterpret_cast<const u8*>(map.address + y * map.apart + x);
      static_cast<u8*>(to)[r * 128 + 16 * (byte / 16 ^ r % 8) + byte % 16] = y < map.rows && x < map.wide ? *from : 0;
    }
  }
  done.came(static_cast<int>(map.box_rows * map.box_bytes));
}
inline void copy_box(void* to, const TensorMap& map, int column, int row, Barrier& done, u64) {
  copy_box(to, map, column, row, done);
}
