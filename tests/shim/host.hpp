// What both schedulers share: the arguments of a launch, its message, and shared memory between poisoned borders.
#pragma once
#include "simt.hpp"

extern "C" char __start_simt_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_simt_shared[] __attribute__((weak, visibility("hidden")));

namespace simt {

struct Launch {
  void (*kernel)(void**);
  void** arguments;
  unsigned grid, block, shared_bytes;
  unsigned first, last;  // the blocks that run
  unsigned order;
  unsigned cluster = 1;  // blocks that run at once; their static shared memory would be one
};

inline char message[512];
inline char* dynamic_end = nullptr;  // the byte after the dynamic shared memory: a page that nobody may touch
inline std::size_t dynamic_bytes = 0;
constexpr std::size_t MOST_SHARED = 256 << 10;
constexpr unsigned char POISON = 0xFF;  // NaN in every float format

// Behind the dynamic memory of each block of a cluster lies a page that nobody may touch.
constexpr unsigned MOST_BLOCKS = 16;
constexpr std::size_t APART = MOST_SHARED + 4096;

inline std::size_t rounded_up(std::size_t bytes) { return (bytes + 15) / 16 * 16; }

inline void* dynamic_shared_of(unsigned rank) { return dynamic_end + rank * APART - rounded_up(dynamic_bytes); }

inline void poison_shared(unsigned bytes, unsigned blocks = 1) {
  if (__start_simt_shared) std::memset(__start_simt_shared, POISON, __stop_simt_shared - __start_simt_shared);
  if (!dynamic_end) {
    char* all = static_cast<char*>(mmap(nullptr, MOST_BLOCKS * APART, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    dynamic_end = all + MOST_SHARED;
    for (unsigned i = 0; i < MOST_BLOCKS; i++) mprotect(dynamic_end + i * APART, 4096, PROT_NONE);
  }
  dynamic_bytes = bytes;
  for (unsigned i = 0; bytes && i < blocks; i++)
    std::memset(static_cast<char*>(dynamic_shared_of(i)) - 64, POISON, rounded_up(bytes) + 64);
}

// Whether the border before the dynamic shared memory and the rest of its last 16 bytes are as they were.
inline bool shared_is_whole(unsigned blocks = 1) {
  for (unsigned i = 0; dynamic_bytes && i < blocks; i++) {
    const char* begin = static_cast<char*>(dynamic_shared_of(i));
    for (const char* at = begin - 64; at < dynamic_end + i * APART; at++) {
      if (at == begin) at += dynamic_bytes;
      if (at < dynamic_end + i * APART && static_cast<unsigned char>(*at) != POISON) {
        std::snprintf(message, sizeof message, "a write outside the dynamic shared memory, at %ld", long(at - begin));
        return false;
      }
    }
  }
  return true;
}

// Call a kernel with its own parameter types from pointers to the arguments, as the driver does.
template <class... P, std::size_t... N>
void call(void (*function)(P...), void** arguments, std::index_sequence<N...>) {
  function(*static_cast<std::remove_cv_t<P>*>(arguments[N])...);
}
template <class... P>
void call(void (*function)(P...), void** arguments) {
  call(function, arguments, std::index_sequence_for<P...>());
}

// One letter a parameter: p pointer, i 32-bit and l 64-bit integer, f float, m tensor map; ? what a launch cannot pass.
template <class T>
constexpr char letter() {
  if (std::is_pointer_v<T>) return 'p';
  if (std::is_same_v<T, float>) return 'f';
  if (std::is_class_v<T> && sizeof(T) == 128) return 'm';
  if (std::is_integral_v<T>) return sizeof(T) == 4 ? 'i' : sizeof(T) == 8 ? 'l' : '?';
  return '?';
}
template <class... P>
const char* letters(void (*)(P...)) {
  static const char text[] = {letter<P>()..., 0};
  return text;
}

// Memory of one tensor: its last byte (rounded up to 16) lies before a page that nobody may touch, and what is in front
// of it is poison. Returns where the tensor begins.
inline char* fenced(std::size_t bytes) {
  const std::size_t aligned = (bytes + 15) / 16 * 16;
  const std::size_t mapped = (aligned + 64 + 4095) / 4096 * 4096 + 4096;
  char* all = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  std::memset(all, POISON, mapped - 4096);
  mprotect(all + mapped - 4096, 4096, PROT_NONE);
  return all + mapped - 4096 - aligned;
}

// How many bytes of the fence around a tensor changed; gives the memory back.
inline std::size_t unfence(char* begin, std::size_t bytes) {
  const std::size_t aligned = (bytes + 15) / 16 * 16;
  const std::size_t mapped = (aligned + 64 + 4095) / 4096 * 4096 + 4096;
  char* const all = begin + aligned + 4096 - mapped;
  std::size_t changed = 0;
  for (char* at = all; at < all + mapped - 4096; at++)
    changed += (at < begin || at >= begin + bytes) && static_cast<unsigned char>(*at) != POISON;
  munmap(all, mapped);
  return changed;
}

}  // namespace simt
