// In place of csrc/common/copy.cuh on the host: a copy is made when it is waited for, and no earlier.
#pragma once
#include "common/device.cuh"

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int bytes;
};

inline void make(const Copy& one) {
  if (one.from) {
    std::memcpy(one.to, one.from, one.bytes);
  } else {
    std::memset(one.to, 0, one.bytes);
  }
}

// Of each thread: groups of copies, the last one open.
inline std::vector<std::vector<Copy>>& copy_groups() {
  static std::vector<std::vector<std::vector<Copy>>> all;
  static unsigned epoch = 0;
  const unsigned me = simt::cluster_rank() * blockDim.x + threadIdx.x;
  if (epoch != simt::epoch()) all.assign(blockDim.x * simt::cluster_size(), {{}}), epoch = simt::epoch();
  return all[me];
}

template <int BYTES>
void copy_async(void* shared, const void* global, bool there) {
  if ((reinterpret_cast<u64>(shared) | (there ? reinterpret_cast<u64>(global) : 0)) % BYTES)
    simt::fail("a copy that is not aligned");
  copy_groups().back().push_back({shared, there ? global : nullptr, BYTES});
}
inline void copy16_async(void* shared, const void* global) { copy_async<16>(shared, global, true); }

inline void copies_commit() { copy_groups().emplace_back(); }

template <int LEFT>
void copies_wait() {
  std::vector<std::vector<Copy>>& groups = copy_groups();
  while (groups.size() > LEFT + 1) {
    for (const Copy& one : groups.front()) make(one);
    groups.erase(groups.begin());
  }
}
inline void copies_done() { copies_commit(), copies_wait<0>(); }
