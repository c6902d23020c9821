// Warpgroup products of sm_90a in FP16: 64 rows in registers times 64 in shared memory, 16 columns an instruction, FP32 sums.
//
// Rows in shared memory lie as in wgmma.cuh, 64 columns to a row of 128 bytes. Registers: warp w of the four has rows
// 16 w .. 16 w + 15, lane 4 g + t of it in a[0] and a[2] of row g, in a[1] and a[3] of row g + 8; in the first two columns
// 2 t and 2 t + 1 of 16, in the others columns 8 + 2 t and 9 + 2 t. Its sums d[4 j + i] are of row g, for i above 1 of row
// g + 8, with the others' row 8 j + 2 t + i % 2.
#pragma once
#include "common/wgmma.cuh"

__device__ __forceinline__ void wgmma_half(float (&d)[32], const u32 (&a)[4], u64 b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
