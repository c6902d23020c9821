// One block at a time, its threads as OS threads: slow, and made for ThreadSanitizer. __syncthreads() and __syncwarp()
// order memory. A shuffle exchanges values but orders nothing, so its own locking is hidden from the sanitizer.
#pragma once
#include "host.hpp"

extern "C" {
void AnnotateIgnoreSyncBegin(const char*, int);
void AnnotateIgnoreSyncEnd(const char*, int);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}

namespace simt {

struct Unseen {
  Unseen() {
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
  }
};

struct Warp {
  std::mutex lock;
  std::condition_variable changed;
  unsigned arrived = 0, answered = 0;  // lanes waiting, lanes that have an answer to fetch
  Request lanes[32];
};

inline unsigned threads = 0;
inline std::vector<Warp> warps;
inline std::barrier<>* whole_block = nullptr;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::_Exit(3);
}

inline void* dynamic_shared() { return dynamic_shared_of(0); }
inline void block_barrier() { whole_block->arrive_and_wait(); }

inline std::uint64_t meet(Warp& warp, unsigned lane, unsigned group, const Request& request) {
  std::unique_lock<std::mutex> held(warp.lock);
  // Lanes of the last exchange may still have to fetch their answers.
  warp.changed.wait(held, [&] { return !(warp.answered & group); });
  warp.lanes[lane] = request;
  warp.arrived |= 1u << lane;
  if ((warp.arrived & group) == group) {
    if (!answer(warp.lanes, group)) fail("lanes of one mask at different shuffles, or a value of no lane");
    warp.arrived &= ~group;
    warp.answered |= group;
    warp.changed.notify_all();
  }
  warp.changed.wait(held, [&] { return warp.answered >> lane & 1; });
  const std::uint64_t found = warp.lanes[lane].answer;
  warp.answered &= ~(1u << lane);
  warp.changed.notify_all();
  return found;
}

inline std::uint64_t exchange(Request request) {
  const unsigned me = threadIdx.x, first = me & ~31u, lane = me & 31;
  unsigned group = request.mask;
  if (threads - first < 32) group &= (1u << (threads - first)) - 1;
  if (request.kind == Exchange::sync) return meet(warps[me / 32], lane, group, request);
  Unseen unseen;
  return meet(warps[me / 32], lane, group, request);
}

inline int launch(const Launch& l) {
  threads = l.block;
  warps = std::vector<Warp>((l.block + 31) / 32);
  for (unsigned block = l.first; block < l.last; block++) {
    poison_shared(l.shared_bytes);
    std::barrier<> all(l.block);
    whole_block = &all;
    std::vector<std::thread> running;
    for (unsigned i = 0; i < l.block; i++)
      running.emplace_back([&l, block, i] {
        threadIdx = {i, 0, 0};
        blockIdx = {block, 0, 0};
        l.kernel(l.arguments);
      });
    for (std::thread& thread : running) thread.join();
    if (!shared_is_whole()) fail(message);
  }
  return 0;
}

}  // namespace simt
