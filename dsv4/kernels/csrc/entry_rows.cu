// Rows in which entries of sequences lie, by the tables of their pages.
//
// Moves   a token's 512 entries and their rows, 8 KiB: latency, which is why it is one launch.
// Form    a thread an entry.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/device.cuh"

extern "C" __global__ void __launch_bounds__(256)
    entry_rows(const i64* entries, int count, const i64* table, i64 stride, const i64* slots, int page, int tokens, i64* rows) {
  pdl_trigger();
  pdl_wait();
  const i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= static_cast<i64>(tokens) * count) return;
  const i64 entry = entries[i];
  if (entry < 0) {
    rows[i] = -1;
    return;
  }
  const int number = static_cast<int>(entry), of = number / page;  // a context has fewer than 2^31 tokens
  rows[i] = table[slots[i / count] * stride + of] * page + (number - of * page);
}
