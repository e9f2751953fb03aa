// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The matrix product of a thread block: 256 threads multiply two tiles that they have put into shared memory.
#pragma once

#include "cuda/launch.cuh"

namespace dcn::cuda {

constexpr int kThreads = 256;
constexpr int kTile = 64;   // rows and columns of a product
constexpr int kDepth = 16;  // terms of the sums at a time
constexpr int kSide = 16;   // threads along each side of the product
constexpr int kEach = 4;    // rows and columns of a thread
static_assert(kSide * kSide == kThreads && kSide * kEach == kTile && kTile % kDepth == 0);

// Blocks that a multiprocessor must hold at least. The compiler may use as many registers as that leaves, and then
// spills none.
template <typename T>
constexpr int kBlocksPerProcessor = sizeof(T) == 8 ? 1 : 2;

// One operand. The padding puts neighbours in either direction into different banks.
template <typename A>
struct Operand {
  A value[kDepth][kTile + 1];
};

// A thread's share of the product. Neighbouring threads have neighbouring columns.
template <typename A>
struct Product {
  A value[kEach][kEach] = {};

  __device__ __forceinline__ static int row(int i) { return static_cast<int>(threadIdx.x) / kSide + kSide * i; }
  __device__ __forceinline__ static int column(int j) { return static_cast<int>(threadIdx.x) % kSide + kSide * j; }

  __device__ __forceinline__ void add(const Operand<A>& rows, const Operand<A>& columns) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      A left[kEach], right[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) left[i] = rows.value[k][row(i)], right[i] = columns.value[k][column(i)];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) value[i][j] += left[i] * right[j];
      }
    }
  }
};

// Fills an operand with get(k, i). Neighbouring threads take neighbouring k, or neighbouring i: whichever lie side by
// side in memory.
template <typename A, typename Get>
__device__ __forceinline__ void fill_along_depth(Operand<A>& operand, const Get& get) {
  for (int index = threadIdx.x; index < kDepth * kTile; index += kThreads) {
    operand.value[index % kDepth][index / kDepth] = get(index % kDepth, index / kDepth);
  }
}
template <typename A, typename Get>
__device__ __forceinline__ void fill_along_tile(Operand<A>& operand, const Get& get) {
  for (int index = threadIdx.x; index < kDepth * kTile; index += kThreads) {
    operand.value[index / kTile][index % kTile] = get(index / kTile, index % kTile);
  }
}

}  // namespace dcn::cuda
