// One block at a time, its threads as fibers of the calling thread: cheap, repeatable, and strict. A thread runs until
// it meets a barrier or a shuffle; `order` says which thread goes first, so that a missing barrier shows in one of two
// runs. Faults of the kernel (a wild address, undefined behaviour that the compiler traps, a barrier that not all
// threads reach) end the launch with a message and leave the process alive.
#pragma once
#include "host.hpp"

namespace simt {

enum class State { ready, at_barrier, at_cluster, at_exchange, done };

struct Fiber {
  ucontext_t context;
  jmp_buf at;
  bool started = false;
  State state = State::done;
};

constexpr std::size_t STACK = 96 << 10;  // sanitised frames are large
inline std::vector<Fiber> fibers;
inline std::vector<Request> requests;
inline std::vector<unsigned> arrived;  // a warp's lanes that wait at a shuffle
inline char* stacks = nullptr;
inline unsigned running = 0, threads = 0, looks = 0;
inline unsigned in_block = 0, first_block = 0;  // threads of a block, and the cluster's first block
inline jmp_buf scheduler;
inline sigjmp_buf fault;
inline ucontext_t unused;
inline void (*kernel)(void**) = nullptr;
inline void** arguments = nullptr;

[[noreturn]] inline void fail(const char* what) {
  std::snprintf(message, sizeof message, "block %u, thread %u: %s", blockIdx.x, threadIdx.x, what);
  siglongjmp(fault, 1);
}

inline void pause(State state) {
  fibers[running].state = state;
  if (!_setjmp(fibers[running].at)) _longjmp(scheduler, 1);
}

inline void block_barrier() { pause(State::at_barrier); }

inline unsigned cluster_rank() { return running / in_block; }
inline unsigned cluster_size() { return threads / in_block; }
inline void cluster_barrier() { pause(State::at_cluster); }
inline unsigned epochs = 0;
inline unsigned epoch() { return epochs; }
inline void* dynamic_shared() { return dynamic_shared_of(cluster_rank()); }

// A thread that looks again and again for what others do lets them go on. Right kernels look a million times a block.
inline void give_way() {
  if (++looks > 1u << 25) fail("threads wait for what does not come");
  pause(State::ready);
}

inline std::uint64_t exchange(Request request) {
  const unsigned me = running, first = me & ~31u, lane = me & 31;
  unsigned group = request.mask;
  if (threads - first < 32) group &= (1u << (threads - first)) - 1;
  if (!(group >> lane & 1)) fail("a shuffle whose mask leaves out the lane itself");
  requests[me] = request;
  unsigned& waiting = arrived[me / 32];
  waiting |= 1u << lane;
  if ((waiting & group) != group) {
    pause(State::at_exchange);
    return requests[me].answer;
  }
  if (!answer(&requests[first], group)) fail("lanes of one mask at different shuffles, or a value of no lane");
  waiting &= ~group;
  for (unsigned left = group; left; left &= left - 1) fibers[first + std::countr_zero(left)].state = State::ready;
  return requests[me].answer;
}

inline void body() {
  for (;;) {
    kernel(arguments);
    pause(State::done);
  }
}

inline void resume(unsigned thread) {
  Fiber& fiber = fibers[thread];
  running = thread;
  threadIdx = {thread % in_block, 0, 0}, blockIdx = {first_block + thread / in_block, 0, 0};
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {.ss_sp = stacks + STACK * thread, .ss_flags = 0, .ss_size = STACK};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, body, 0);
  swapcontext(&unused, &fiber.context);
}

// What to do once no thread can run: false when all have left the kernel.
inline bool release() {
  unsigned counts[5] = {};
  bool released = false;
  for (unsigned first = 0; first < threads; first += in_block) {
    unsigned waiting = 0;
    for (unsigned i = first; i < first + in_block; i++) {
      counts[int(fibers[i].state)]++;
      waiting += fibers[i].state == State::at_barrier;
    }
    if (waiting < in_block) continue;
    released = true;
    for (unsigned i = first; i < first + in_block; i++) fibers[i].state = State::ready;
  }
  if (released) return true;
  const unsigned done = counts[int(State::done)], met = counts[int(State::at_cluster)];
  if (done == threads) return false;
  if (counts[int(State::at_exchange)]) fail("a shuffle waits for lanes that went elsewhere");
  if (met < threads) fail("a thread left the kernel while others wait at __syncthreads()");
  for (unsigned i = 0; i < threads; i++) fibers[i].state = State::ready;
  return true;
}

// order: 0 upwards, 1 downwards, else the seed of a new permutation in every round.
inline void run_block(unsigned order) {
  static std::vector<unsigned> turn;
  turn.resize(threads);
  for (unsigned i = 0; i < threads; i++) {
    turn[i] = order == 1 ? threads - 1 - i : i;
    fibers[i].state = State::ready;
  }
  unsigned noise = order;
  do {
    for (bool moved = true; moved;) {
      moved = false;
      for (unsigned i = threads; order > 1 && i > 1; i--) {
        noise = noise * 1664525u + 1013904223u;
        std::swap(turn[i - 1], turn[(noise >> 8) % i]);
      }
      for (unsigned i : turn) {
        if (fibers[i].state != State::ready) continue;
        resume(i);
        moved = true;
      }
    }
  } while (release());
}

inline void on_signal(int number, siginfo_t* info, void* at) {
  const ucontext_t* context = static_cast<ucontext_t*>(at);
#if defined(__x86_64__)
  void* const code = reinterpret_cast<void*>(context->uc_mcontext.gregs[REG_RIP]);
#else
  void* const code = reinterpret_cast<void*>(context->uc_mcontext.pc);
#endif
  Dl_info where{};
  dladdr(code, &where);
  const long offset = static_cast<char*>(code) - static_cast<char*>(where.dli_fbase);
  const bool trap = number == SIGILL || number == SIGTRAP || number == SIGABRT;
  const char* kind = trap ? "undefined behaviour (overflow, index, shift or alignment)" : "memory that is not its own";
  char text[200];
  std::snprintf(text, sizeof text, "%s, at %#lx, address %p", kind, offset, trap ? code : info->si_addr);
  fail(text);
}

inline int launch(const Launch& l) {
  static char* signal_stack = static_cast<char*>(std::malloc(64 << 10));
  static const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};
  threads = l.block * l.cluster, in_block = l.block;
  if (fibers.size() < threads) {
    if (stacks) munmap(stacks, fibers.size() * STACK);
    fibers = std::vector<Fiber>(threads);
    stacks = static_cast<char*>(
        mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  requests.assign(threads + 32, {});
  arrived.assign(threads / 32 + 1, 0);
  kernel = l.kernel, arguments = l.arguments;
  stack_t mine{.ss_sp = signal_stack, .ss_flags = 0, .ss_size = 64 << 10}, theirs;
  struct sigaction action{}, old[5];
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaltstack(&mine, &theirs);
  for (int i = 0; i < 5; i++) sigaction(signals[i], &action, &old[i]);
  int failed = sigsetjmp(fault, 1);
  if (!failed)
    for (unsigned block = l.first; block < l.last; block += l.cluster) {
      first_block = block, blockIdx = {block, 0, 0};
      looks = 0, epochs++;
      poison_shared(l.shared_bytes, l.cluster);
      run_block(l.order);
    }
  else
    for (Fiber& fiber : fibers) fiber.started = false;
  for (int i = 0; i < 5; i++) sigaction(signals[i], &old[i], nullptr);
  sigaltstack(&theirs, nullptr);
  return failed || !shared_is_whole(l.cluster);
}

}  // namespace simt
