// Sinkhorn's iteration on matrices of up to 16 x 16, one warp a matrix, FP32. Equation: `sinkhorn` of dsv4/ops/mhc.py.
//
// The reference divides the matrix by its row sums plus eps, then by its column sums plus eps, 20 times. Here the
// matrix stays as the softmax left it, and two vectors are iterated: a_ik = a0_ik u_i v_k. Dividing row i by (sum +
// eps) makes u_i into u_i / (u_i s_i + eps), s_i = sum_k a0_ik v_k, and with p_i = 1 / u_i that is
//
//     p_i <- s_i + eps p_i,  u_i <- 1 / p_i          and the same for the columns with q_k = 1 / v_k
//
// That takes 4 reciprocals for each half of a round of a 4 x 4 matrix where the division of the matrix takes 16, and no
// exchange between lanes. Rounding errors of earlier rounds do not pile up: u is computed anew from v and v from u.
// Since a0 >= eps nothing overflows. Against FP64 its error is that of the division, 3e-7 at most at any logits.
//
// Latency of a half round (4 x 4, from the cycle counts of FMA 4, MUFU about 20): 3 FMAs deep, reciprocal 28: about 40
// cycles; 39 of them 1,560 cycles, 0.9 us at 1.75 GHz.
//
// -inf is a weight of zero; a row of -inf, NaN or +inf makes the whole matrix NaN, as in the reference.
#pragma once

// 1 / x as IEEE rounds it, for normal x with a normal reciprocal: what the compiler makes of 1.0f / x without the
// branch for all other x, which would run four of them one after another. NaN for NaN and infinities.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return fmaf(r, -fmaf(x, r, -1.0f), r);
#else
  return 1.0f / x;
#endif
}

// a / b as IEEE rounds it, from r = reciprocal(b): the remainder of the first quotient is exact (Markstein). For 0 <=
// a <= 1 and b of 1 to 16; a subnormal quotient may be off by a little of its last place, which eps then covers.
__device__ __forceinline__ float divided(float a, float b, float r) {
  const float quotient = a * r;
  return fmaf(fmaf(-b, quotient, a), r, quotient);
}

// One half of a round: sum of four products plus eps times the old reciprocal. Two short chains instead of a long one.
__device__ __forceinline__ float weighted_4(float a, float b, float c, float d, const float (&by)[4], float rest) {
  return fmaf(b, by[1], fmaf(a, by[0], rest)) + fmaf(d, by[3], c * by[2]);
}

__device__ __forceinline__ float pick(const float (&of)[4], int which) {
  const float low = which & 1 ? of[1] : of[0], high = which & 1 ? of[3] : of[2];
  return which & 2 ? high : low;
}

// Lane 4 i + k (and the same lane of the upper half) gives logit (i, k) and gets the result at (i, k).
// Every lane iterates on the whole matrix: a lane alone would take as long.
__device__ __forceinline__ float sinkhorn_4(float logit, int iterations, float eps) {
  float top = fmaxf(logit, __shfl_xor_sync(~0u, logit, 1));
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
  const float raised = expf(logit - top);
  float sum = raised + __shfl_xor_sync(~0u, raised, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  const float own = divided(raised, sum, reciprocal(sum)) + eps;
  float a[16];
#pragma unroll
  for (int e = 0; e < 16; e++) a[e] = __shfl_sync(~0u, own, e);
  float u[4] = {1, 1, 1, 1}, p[4] = {1, 1, 1, 1}, v[4] = {1, 1, 1, 1}, q[4] = {1, 1, 1, 1};
#pragma unroll 1
  for (int step = 0; step < iterations; step++) {
    if (step) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        p[i] = weighted_4(a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3], v, eps * p[i]);
        u[i] = reciprocal(p[i]);
      }
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
      q[k] = weighted_4(a[k], a[4 + k], a[8 + k], a[12 + k], u, eps * q[k]);
      v[k] = reciprocal(q[k]);
    }
  }
  const int e = threadIdx.x & 15;
  return own * pick(u, e >> 2) * pick(v, e & 3);
}

constexpr int SINKHORN_STRIDE = 17;  // floats from row to row in shared memory: lanes on 17 banks

// Any m of 1 to 16. `a`: shared, m rows of SINKHORN_STRIDE floats, logits on entry, the result on return; a warp's own.
// Lane i holds row i and column i; lanes past m repeat the last one's work.
__device__ __forceinline__ void sinkhorn_any(float* a, int m, int iterations, float eps) {
  const int lane = threadIdx.x & 31, i = lane < m ? lane : m - 1;
  float row[16], column[16];
#pragma unroll
  for (int k = 0; k < 16; k++) row[k] = k < m ? a[i * SINKHORN_STRIDE + k] : -__int_as_float(0x7F800000);
  float top = row[0];
#pragma unroll
  for (int k = 1; k < 16; k++) top = fmaxf(top, row[k]);
  float sum = 0;
#pragma unroll
  for (int k = 0; k < 16; k++) {
    row[k] = k < m ? expf(row[k] - top) : 0;
    sum += row[k];
  }
  const float over = reciprocal(sum);
#pragma unroll
  for (int k = 0; k < 16; k++) row[k] = divided(row[k], sum, over) + eps;
  __syncwarp();
#pragma unroll
  for (int k = 0; k < 16; k++)
    if (lane < m && k < m) a[i * SINKHORN_STRIDE + k] = row[k];
  __syncwarp();
#pragma unroll
  for (int k = 0; k < 16; k++) column[k] = k < m ? a[k * SINKHORN_STRIDE + i] : 0;
  float u = 1, p = 1, v = 1, q = 1;
#pragma unroll 1
  for (int step = 0; step < iterations; step++) {
    if (step) {
      p *= eps;
#pragma unroll
      for (int k = 0; k < 16; k++)
        if (k < m) p = fmaf(row[k], __shfl_sync(~0u, v, k), p);
      u = reciprocal(p);
    }
    q *= eps;
#pragma unroll
    for (int k = 0; k < 16; k++)
      if (k < m) q = fmaf(column[k], __shfl_sync(~0u, u, k), q);
    v = reciprocal(q);
  }
  __syncwarp();
#pragma unroll
  for (int k = 0; k < 16; k++) {
    const float found = row[k] * u * __shfl_sync(~0u, v, k);
    if (lane < m && k < m) a[i * SINKHORN_STRIDE + k] = found;
  }
  __syncwarp();
}
