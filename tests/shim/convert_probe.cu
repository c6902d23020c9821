// What common/convert.cuh makes of numbers, for test_kernels_convert.py. The same text runs on the host and on a GPU.
//
// arch: sm_90a sm_100a sm_103a sm_120a
#include "common/formats.cuh"

// out: [n, 6]: BF16, E4M3, E2M1 by integer code, then as the kernels convert.
extern "C" __global__ void narrowed(const float* x, u32* out, i64 n) {
  const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float v = x[i], unit = v * E2M1_UNIT<false>, cut = fmaxf(fminf(v, 6.0f), -6.0f), near = round_bf16(cut);
  const float half = cut * E2M1_UNIT<true>;
  const float eight[8] = {0, unit, -unit, unit, 0, 0, 0, unit}, same[8] = {near, 0, -near, 0, near, 0, near, 0};
  float units[8], shorts[8];
  for (int j = 0; j < 8; j++) units[j] = same[j] * E2M1_UNIT<false>, shorts[j] = same[j] * E2M1_UNIT<true>;
  u32* const to = out + 6 * i;
  to[0] = bf16_bits(v), to[1] = e4m3_bits(v);
  to[2] = (__float_as_uint(v) >> 28 & 8) | narrow_bits<1, 0>(fminf(fabsf(v), 6.0f));
  to[3] = bf16x2(1.0f, v) >> 16, to[4] = e4m3x2(1.0f, v) >> 8;
  const u32 word = e2m1x8<false>(eight, eight), mirrored = word >> 8 & 15 ^ 8;
  const bool agreed = (word >> 4 & 15) == word >> 28 && (word >> 4 & 15) == mirrored &&
                      e2m1x8<true>(shorts, shorts) == e2m1x8<false>(units, same) &&
                      halfx2(half, -half) == (half_bits(half) | half_bits(-half) << 16);
  to[5] = agreed ? word >> 28 : 99;
}

// out: [256, 2] FP32 of every E4M3 and every UE8M0 byte.
extern "C" __global__ void widened(float* out) {
  out[2 * threadIdx.x] = e4m3_float(threadIdx.x);
  out[2 * threadIdx.x + 1] = ue8m0_float(threadIdx.x);
}

// out[i]: the code of x[i] / step[i] as NVFP4 divides.
extern "C" __global__ void divided(const float* x, const float* step, u32* out, i64 n) {
  const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float quotient = Divisor(step[i])(x[i]);
  const float same[8] = {quotient, 0, 0, 0, 0, 0, 0, 0}, sign[8] = {x[i], 0, 0, 0, 0, 0, 0, 0};
  out[i] = e2m1x8<false>(same, sign);
}
