// Products of 16 rows of weights with 8 tokens, 16 columns an instruction, BF16 with FP32 sums: the same instruction for
// one token and for thousands, so a row's bits are its own.
//
// Operands lie in shared memory as boxes of 64 columns, rows of 128 bytes, the 16-byte pieces of row r at place
// `piece ^ (r % 8)`. A product sums over its columns in an order that is the instruction's own affair, as long as both
// operands have the same: lane 4 g + t holds pieces 2 t and 2 t + 1 of row g, so that a lane loads 16 bytes at a time and
// no eight lanes meet in a bank.
//
// The order of a sum: slices of 256 columns, each a chain of 16 instructions from zero, then the slices ascending in FP32,
// from zero. A tensor core cuts off what it shifts out, so short chains are what makes the sum good.
#pragma once
#include "common/stream.cuh"
#include "common/vector.cuh"

constexpr int BOX_COLUMNS = 64, BOX_BYTES = 128, SLICE_BOXES = 4;

__device__ __forceinline__ uint4 box_piece(const u8* box, int row, int piece) {
  return *reinterpret_cast<const uint4*>(box + row * BOX_BYTES + 16 * (piece ^ (row & 7)));
}

// d += the products of half a box: `low` and `high` are rows g and g + 8 of the weights.
__device__ __forceinline__ void mma(float (&d)[4], const uint4& low, const uint4& high, const uint4& x) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(low.x), "r"(high.x), "r"(low.y), "r"(high.y), "r"(x.x), "r"(x.y));
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(low.z), "r"(high.z), "r"(low.w), "r"(high.w), "r"(x.z), "r"(x.w));
}

// d += the products of 16 columns, of which lane 4 g + t holds 2 t, 2 t + 1 in the first words and 8 more in the others:
// a of rows g, g + 8, g, g + 8, b of row g. The sums of rows g and g + 8 with 2 t and 2 t + 1 of b are d.
__device__ __forceinline__ void mma16(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// Four matrices of 8 x 8 numbers: lane l gives the 16 bytes of row l % 8 of matrix l / 8, and gets of each matrix numbers
// 2 t and 2 t + 1 of row g. `load_turned`: of column g.
__device__ __forceinline__ void load_matrices(u32 (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_turned(u32 (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
