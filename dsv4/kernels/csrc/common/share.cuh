// The blocks of a launch that do one thing, where it does several.
#pragma once

struct Share {
  int block, blocks;  // which of them this is, and how many there are
};

__device__ __forceinline__ Share whole() { return {static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)}; }
