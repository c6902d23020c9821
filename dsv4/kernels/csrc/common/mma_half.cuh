// Products of 16 rows with 8 others over 16 columns of FP16, summed in FP32.
#pragma once
#include "common/device.cuh"

// d += the products; lane 4 g + t holds columns 2 t, 2 t + 1 in the first words and 8 more in the others: a of rows g,
// g + 8, g, g + 8, b of row g. The sums of rows g and g + 8 with 2 t and 2 t + 1 of b are d.
__device__ __forceinline__ void mma_half(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}
