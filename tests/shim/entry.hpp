// Included last into every build: what Python calls (a shared library), and the main of a ThreadSanitizer build.
#pragma once
#ifdef SIMT_THREADS
#include "threads.hpp"
#else
#include "fibers.hpp"
#endif

namespace simt {

struct Entry {
  const char* name;
  void (*kernel)(void**);
  const char* letters;
  unsigned most_threads;
};
extern const Entry entries[];  // written by the builder, ended by a null name

inline const Entry* find(const char* name) {
  for (const Entry* entry = entries; entry->name; entry++)
    if (!std::strcmp(entry->name, name)) return entry;
  return nullptr;
}

}  // namespace simt

extern "C" {
const simt::Entry* simt_find(const char* name) { return simt::find(name); }
const char* simt_message() { return simt::message; }
char* simt_fenced(std::size_t bytes) { return simt::fenced(bytes); }
std::size_t simt_unfence(char* begin, std::size_t bytes) { return simt::unfence(begin, bytes); }
int simt_launch(const simt::Launch* l) {
  blockDim = {l->block, 1, 1}, gridDim = {l->grid, 1, 1};
  simt::message[0] = 0;
  return simt::launch(*l);
}
}

#ifdef SIMT_THREADS
// argv: kernel, grid, block, dynamic shared bytes, file. The file: count, then (bytes, content) of each tensor's memory;
// count, then (tensor or -1, offset or bits) of each argument; all numbers 64 bits. The memory is written back.
int main(int, char** argv) {
  const simt::Entry* entry = simt::find(argv[1]);
  std::FILE* file = std::fopen(argv[5], "r+b");
  const auto number = [&] {
    std::int64_t value = 0;
    if (std::fread(&value, 8, 1, file) != 1) std::_Exit(4);
    return value;
  };
  std::vector<std::pair<char*, std::size_t>> memory;
  std::vector<long> at;
  for (std::int64_t left = number(); left > 0; left--) {
    const std::size_t bytes = number();
    at.push_back(std::ftell(file));
    memory.emplace_back(simt::fenced(bytes), bytes);
    if (std::fread(memory.back().first, 1, bytes, file) != bytes) std::_Exit(4);
  }
  std::vector<std::int64_t> values(number());
  std::vector<void*> arguments;
  for (std::int64_t& value : values) {
    const std::int64_t tensor = number(), offset = number();
    value = tensor < 0 ? offset : reinterpret_cast<std::int64_t>(memory[tensor].first + offset);
    arguments.push_back(&value);
  }
  const unsigned grid = std::atoi(argv[2]), block = std::atoi(argv[3]), shared = std::atoi(argv[4]);
  const simt::Launch launch{entry->kernel, arguments.data(), grid, block, shared, 0, grid, 0};
  simt_launch(&launch);
  for (std::size_t i = 0; i < memory.size(); i++) {
    std::fseek(file, at[i], SEEK_SET);
    std::fwrite(memory[i].first, 1, memory[i].second, file);
    if (simt::unfence(memory[i].first, memory[i].second)) simt::fail("a write outside a tensor");
  }
  return std::fclose(file);
}
#endif
