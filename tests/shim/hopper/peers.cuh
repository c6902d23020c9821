// In place of csrc/common/peers.cuh on the host, with the words of a cluster: its blocks' memories lie side by side.
#pragma once
#include "common/stream.cuh"

inline int cluster_rank() { return static_cast<int>(simt::cluster_rank()); }
inline int cluster_size() { return static_cast<int>(simt::cluster_size()); }
inline void meet_cluster() { simt::cluster_barrier(); }
inline void leave_cluster() { simt::cluster_barrier(); }

// Once in a kernel: who has begun goes on, and waits for all the others only where it says so.
inline unsigned& begun() {
  static unsigned count, epoch;
  if (epoch != simt::epoch()) count = 0, epoch = simt::epoch();
  return count;
}
inline void begin_cluster() { begun()++; }
inline void await_cluster() {
  while (begun() < blockDim.x * simt::cluster_size()) simt::give_way();
}

template <class T>
const T* in_block(const T* p, int rank) {
  const char* const own = static_cast<const char*>(simt::dynamic_shared());
  const char* const there = static_cast<const char*>(simt::dynamic_shared_of(rank));
  return reinterpret_cast<const T*>(there + (reinterpret_cast<const char*>(p) - own));
}
inline float4 load_from(const float* p, int rank) { return *reinterpret_cast<const float4*>(in_block(p, rank)); }
inline float2 load_from(const float2* p, int rank) { return *in_block(p, rank); }

inline u64 in_peer(const void* p, int rank) {
  return reinterpret_cast<u64>(in_block(static_cast<const char*>(p), rank));
}
inline void send16(u64 to, const float4& v, u64 barrier) {
  if (to % 16) simt::fail("numbers sent to where they are not aligned");
  *reinterpret_cast<float4*>(to) = v, reinterpret_cast<Barrier*>(barrier)->came(16);
}
inline void send8(u64 to, const float2& v, u64 barrier) {
  if (to % 8) simt::fail("numbers sent to where they are not aligned");
  *reinterpret_cast<float2*>(to) = v, reinterpret_cast<Barrier*>(barrier)->came(8);
}
inline void send4(u64 to, u32 v, u64 barrier) {
  *reinterpret_cast<u32*>(to) = v, reinterpret_cast<Barrier*>(barrier)->came(4);
}
