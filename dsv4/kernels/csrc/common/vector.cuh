// Rows in memory, eight columns a lane: the same for BF16 and FP32, so that a row is cut alike whatever its dtype.
#pragma once
#include "common/convert.cuh"

struct bf16 {
  u16 bits;
};

constexpr int EIGHT = 8;  // columns of a lane
constexpr int WARP_COLUMNS = 32 * EIGHT;  // of a warp: a chunk

// Eight numbers as they were loaded.
template <class T>
struct Raw8;
template <>
struct Raw8<bf16> {
  uint4 words;
};
template <>
struct Raw8<float> {
  uint4 words[2];
};

__device__ __forceinline__ float to_float(bf16 x) { return bf16_float(x.bits); }
__device__ __forceinline__ float to_float(float x) { return x; }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  return {static_cast<u16>(bf16x2(x, 0.0f))};
}
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}

// x rounded to T, as FP32.
template <class T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(narrow<T>(x));
}

__device__ __forceinline__ void pack(Raw8<bf16>& raw, const float (&v)[8]) {
  raw.words = make_uint4(bf16x2(v[0], v[1]), bf16x2(v[2], v[3]), bf16x2(v[4], v[5]), bf16x2(v[6], v[7]));
}

__device__ __forceinline__ void pack(Raw8<float>& raw, const float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 2; i++)
    raw.words[i] = make_uint4(__float_as_uint(v[4 * i]), __float_as_uint(v[4 * i + 1]), __float_as_uint(v[4 * i + 2]),
                              __float_as_uint(v[4 * i + 3]));
}

__device__ __forceinline__ void widen(const Raw8<bf16>& raw, float (&v)[8]) {
  const u32 words[4] = {raw.words.x, raw.words.y, raw.words.z, raw.words.w};
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
}

__device__ __forceinline__ void widen(const Raw8<float>& raw, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    v[4 * i] = __uint_as_float(raw.words[i].x), v[4 * i + 1] = __uint_as_float(raw.words[i].y);
    v[4 * i + 2] = __uint_as_float(raw.words[i].z), v[4 * i + 3] = __uint_as_float(raw.words[i].w);
  }
}

// Eight numbers as T holds them, in v too.
template <class T>
__device__ __forceinline__ Raw8<T> rounded8(float (&v)[8]) {
  Raw8<T> raw;
  pack(raw, v);
  widen(raw, v);
  return raw;
}

__device__ __forceinline__ void load_whole(Raw8<bf16>& raw, const bf16* p) { raw.words = load16_once(p); }

__device__ __forceinline__ void load_whole(Raw8<float>& raw, const float* p) {
  // Both halves of a 32-byte sector: the first cache keeps it from one to the other.
  raw.words[0] = *reinterpret_cast<const uint4*>(p);
  raw.words[1] = *reinterpret_cast<const uint4*>(p + 4);
}

__device__ __forceinline__ void store_whole(bf16* p, const Raw8<bf16>& raw) {
  *reinterpret_cast<uint4*>(p) = raw.words;
}

__device__ __forceinline__ void store_whole(float* p, const Raw8<float>& raw) {
  *reinterpret_cast<uint4*>(p) = raw.words[0];
  *reinterpret_cast<uint4*>(p + 4) = raw.words[1];
}

// What follows runs at the end of a row whose length is no multiple of eight, and for rows that are not aligned: short
// code, not fast code. A register array cannot be indexed in a loop that stays one, so the words move through a window.

__device__ __forceinline__ void load_part(Raw8<bf16>& raw, const bf16* p, int count) {
  raw.words = make_uint4(0, 0, 0, 0);
#pragma unroll 1
  for (int i = (count < EIGHT ? count : EIGHT) - 1; i >= 0; i--) {
    raw.words.w = raw.words.w << 16 | raw.words.z >> 16, raw.words.z = raw.words.z << 16 | raw.words.y >> 16;
    raw.words.y = raw.words.y << 16 | raw.words.x >> 16, raw.words.x = raw.words.x << 16 | p[i].bits;
  }
}

__device__ __forceinline__ void load_part(Raw8<float>& raw, const float* p, int count) {
  raw.words[0] = raw.words[1] = make_uint4(0, 0, 0, 0);
#pragma unroll 1
  for (int i = (count < EIGHT ? count : EIGHT) - 1; i >= 0; i--) {
    raw.words[1] = make_uint4(raw.words[0].w, raw.words[1].x, raw.words[1].y, raw.words[1].z);
    raw.words[0] = make_uint4(__float_as_uint(p[i]), raw.words[0].x, raw.words[0].y, raw.words[0].z);
  }
}

__device__ __forceinline__ void store_part(bf16* p, Raw8<bf16> raw, int count) {
#pragma unroll 1
  for (int i = 0; i < EIGHT && i < count; i++) {
    p[i].bits = static_cast<u16>(raw.words.x);
    raw.words.x = raw.words.x >> 16 | raw.words.y << 16, raw.words.y = raw.words.y >> 16 | raw.words.z << 16;
    raw.words.z = raw.words.z >> 16 | raw.words.w << 16, raw.words.w >>= 16;
  }
}

__device__ __forceinline__ void store_part(float* p, Raw8<float> raw, int count) {
#pragma unroll 1
  for (int i = 0; i < EIGHT && i < count; i++) {
    p[i] = __uint_as_float(raw.words[0].x);
    raw.words[0] = make_uint4(raw.words[0].y, raw.words[0].z, raw.words[0].w, raw.words[1].x);
    raw.words[1] = make_uint4(raw.words[1].y, raw.words[1].z, raw.words[1].w, 0);
  }
}

// The numbers at p[0 .. count), zeros for the rest of the eight; count may be anything. `wide`: p is 16-byte aligned.
template <class T>
__device__ __forceinline__ Raw8<T> load8(const T* p, int count, bool wide) {
  Raw8<T> raw;
  if (wide && count >= EIGHT) {
    load_whole(raw, p);
  } else {
    load_part(raw, p, count);
  }
  return raw;
}

// The same for constants that many rows share: through the first cache, and before pdl_wait().
__device__ __forceinline__ void load8_shared(float (&v)[8], const float* p, int count, bool wide) {
  widen(load8(p, count, wide), v);
}

// Write the first `count` of eight numbers.
template <class T>
__device__ __forceinline__ void store8(T* p, const Raw8<T>& raw, int count, bool wide) {
  if (wide && count >= EIGHT) {
    store_whole(p, raw);
  } else {
    store_part(p, raw, count);
  }
}

// The same of numbers that T holds exactly.
template <class T>
__device__ __forceinline__ void store8(T* p, const float (&v)[8], int count, bool wide) {
  Raw8<T> raw;
  pack(raw, v);
  store8(p, raw, count, wide);
}

// Write `count` of eight bytes, the first in the lowest. `wide`: p is 8-byte aligned.
__device__ __forceinline__ void store_bytes(u8* p, u32 low, u32 high, int count, bool wide) {
  if (wide && count >= 8) {
    *reinterpret_cast<uint2*>(p) = make_uint2(low, high);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 8 && i < count; i++) {
    p[i] = static_cast<u8>(low);
    low = low >> 8 | high << 24, high >>= 8;
  }
}
