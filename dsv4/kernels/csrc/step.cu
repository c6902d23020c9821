// What follows from the positions of a step's tokens, in launches that are each one of plain PyTorch's ten and more.
//
// Moves   a few KiB a token: latency.
// Form    rotations: a thread a pair of a token and a table. window_rows, block_rows: a thread an entry, a row of blocks
//         a token.
// Angles  the FP32 product of position and step, as a table of them would hold it. What is left of it behind whole turns
//         is computed in FP64: exact to 1e-9 at a million radians, and with no slow way for large ones.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/device.cuh"

constexpr int THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS)
    rotations(const i64* positions, int tokens, const float* steps, const i64* every, int tables, int pairs, float2* cos, float2* sin) {
  pdl_trigger();
  pdl_wait();
  const i64 i = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= static_cast<i64>(tables) * tokens * pairs) return;
  const int pair = static_cast<int>(i % pairs), row = static_cast<int>(i / pairs), table = row / tokens;
  const u32 position = static_cast<u32>(positions[row - table * tokens]), block = static_cast<u32>(every[table]);
  const float angle = static_cast<float>(position / block * block) * steps[table * pairs + pair];
  const double turns = static_cast<double>(angle) * 0.15915494309189533577;  // 1 / (2 pi)
  double sine, cosine;
  sincospi(2 * (turns - rint(turns)), &sine, &cosine);
  const float s = static_cast<float>(sine), c = static_cast<float>(cosine);
  cos[i] = make_float2(c, c);
  sin[i] = make_float2(-s, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    window_rows(const i64* slots, const i64* positions, int ring, int span, int across, i64* write, i64* seen) {
  pdl_trigger();
  pdl_wait();
  const int token = blockIdx.x / across, column = (blockIdx.x - token * across) * THREADS + threadIdx.x;
  const i64 first = slots[token] * ring;
  const int position = static_cast<int>(positions[token]);
  if (column == 0) write[token] = first + position % ring;
  if (column >= span) return;
  const int oldest = position < span ? 0 : position - (span - 1), other = oldest + column;
  seen[static_cast<i64>(token) * span + column] = other > position ? -1 : first + other % ring;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    block_rows(const i64* slots, const i64* positions, const i64* table, i64 stride, int ratio, int page, int count, int across,
               i64* visible, i64* own, i64* rows) {
  pdl_trigger();
  pdl_wait();
  const int token = blockIdx.x / across, entry = (blockIdx.x - token * across) * THREADS + threadIdx.x;
  const int position = static_cast<int>(positions[token]), seen = (position + 1) / ratio;
  const i64* const pages = table + slots[token] * stride;
  const auto row = [&](int of) { return pages[of / page] * page + of % page; };
  if (entry == 0) visible[token] = seen, own[token] = row(position / ratio);
  if (entry < count) rows[static_cast<i64>(token) * count + entry] = entry < seen ? row(entry) : -1;
}
