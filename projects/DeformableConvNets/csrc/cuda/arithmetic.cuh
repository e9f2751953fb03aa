// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// What the tensor cores multiply: how samples become operands, where operands lie in shared memory, and the product of
// a warp. Operands are rows of 128 bytes, eight chunks; a row's chunks are permuted by its index, so that the eight
// rows of a matrix lie in different banks.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda/mma.cuh"

namespace dcn::cuda {

constexpr int kRowChunks = 8;  // chunks of a row: what is summed over in one step
constexpr int kRowBytes = kRowChunks * kChunkBytes;

DCN_HOST_DEVICE unsigned swizzled(unsigned row, unsigned chunk) {
  return row * kRowBytes + (chunk ^ row % kRowChunks) * kChunkBytes;
}

template <Kind kKind>
using Element = std::conditional_t<kKind == Kind::kHalf, torch::headeronly::Half,
                                   std::conditional_t<kKind == Kind::kBFloat16, torch::headeronly::BFloat16, float>>;

template <Kind kKind>
constexpr int kChunkElements = kChunkBytes / static_cast<int>(sizeof(Element<kKind>));

// Rounds to 11 bits: to the nearest, ties away from zero. Infinities and NaN stay what they are.
__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  const uint32_t bits = float_to_bits(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (finite ? bits + 0x1000u : bits) & (finite ? 0xffffe000u : 0xffffffffu);
}

// The elements of a chunk as floats. to_chunk turns them back, rounded to what the tensor cores take.
template <Kind kKind>
__device__ __forceinline__ void to_floats(const Chunk& chunk, float (&values)[kChunkElements<kKind>]) {
  if constexpr (kChunkElements<kKind> == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = bits_to_float(chunk.word[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack<kKind>(chunk.word[i], values[2 * i], values[2 * i + 1]);
  }
}

template <Kind kKind>
__device__ __forceinline__ Chunk to_chunk(const float (&values)[kChunkElements<kKind>]) {
  Chunk chunk;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kKind == Kind::kTF32) {
      chunk.word[i] = round_to_tf32(values[i]);
    } else if constexpr (kKind == Kind::kFloat32) {
      chunk.word[i] = float_to_bits(values[i]);
    } else {
      chunk.word[i] = pack<kKind>(values[2 * i], values[2 * i + 1]);
    }
  }
  return chunk;
}

// Splits a float32 into two halves of 11 bits, whose sum is the value to 22 bits.
__device__ __forceinline__ void split(uint32_t bits, uint32_t& high, uint32_t& low) {
  high = bits & 0xffffe000u;
  const float value = bits_to_float(bits), rest = value - bits_to_float(high);
  low = bits == high ? 0 : round_to_tf32(rest);  // an infinity has no rest
}

// A warp's share of a thread block's product: 16 * kRows rows by 8 * kColumns columns. kColumns is even. With kRaw,
// rows were copied from memory as they are, so rows of kTF32 are rounded here.
template <Kind kKind, int kRows, int kColumns, bool kRaw = false>
struct WarpProduct {
  // The tensor cores round sums towards zero. Over thousands of additions that would cost more accuracy than float32
  // may lose, so with kFloat32 they add up one step only.
  static constexpr bool kSplit = kKind == Kind::kFloat32;
  static constexpr int kStepRows = kSplit ? kRows : 1, kStepColumns = kSplit ? kColumns : 1;

  float value[kRows][kColumns][4] = {};
  float step[kStepRows][kStepColumns][4] = {};

  // Adds the product of chunks 2 * slice and 2 * slice + 1 of both operands. `a_row` and `b_row` are their first rows,
  // multiples of eight.
  __device__ __forceinline__ void add_slice(SharedAddress a, unsigned a_row, SharedAddress b, unsigned b_row,
                                            unsigned slice) {
    const unsigned lane = threadIdx.x % kWarp;
    uint32_t left[kRows][4];
    SharedAddress rows[kRows];
    // Rows are aligned, so that the bits of the chunk are bits of the address.
    const SharedAddress first_row = flip(a + swizzled(a_row + lane % 16, lane / 16), slice * 2 * kChunkBytes);
#pragma unroll
    for (int i = 0; i < kRows; ++i) rows[i] = first_row + i * 16 * kRowBytes;
    load_matrices<kRows>(left, rows);
    round_raw(left);
    const SharedAddress first_column =
        flip(b + swizzled(b_row + lane % 8 + lane / 16 * 8, lane / 8 % 2), slice * 2 * kChunkBytes);
    // Two columns at a time: the compiler then needs registers for no more than that.
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      uint32_t pair[1][4];
      const SharedAddress columns[1] = {first_column + j * 8 * kRowBytes};
      load_matrices<1>(pair, columns);
      const uint32_t right[2][2] = {{pair[0][0], pair[0][1]}, {pair[0][2], pair[0][3]}};
      add(j, left, right);
    }
  }

  // Adds the product of fragments that are loaded already.
  __device__ __forceinline__ void add_fragments(uint32_t (&left)[kRows][4], const uint32_t (&right)[kColumns][2]) {
    round_raw(left);
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      const uint32_t pair[2][2] = {{right[j][0], right[j][1]}, {right[j + 1][0], right[j + 1][1]}};
      add(j, left, pair);
    }
  }

  __device__ __forceinline__ static void round_raw(uint32_t (&left)[kRows][4]) {
    if constexpr (kRaw && kKind == Kind::kTF32) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) left[i][k] = round_to_tf32(bits_to_float(left[i][k]));
      }
    }
  }

  // Adds to two columns.
  __device__ __forceinline__ void add(int column, const uint32_t (&left)[kRows][4], const uint32_t (&right)[2][2]) {
    if constexpr (kSplit) {
      uint32_t left_high[kRows][4], left_low[kRows][4], right_high[2][2], right_low[2][2];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) split(left[i][k], left_high[i][k], left_low[i][k]);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int k = 0; k < 2; ++k) split(right[j][k], right_high[j][k], right_low[j][k]);
      }
      multiply<kKind>(step, column, left_low, right_high);
      multiply<kKind>(step, column, left_high, right_low);
      multiply<kKind>(step, column, left_high, right_high);
    } else {
      multiply<kKind>(value, column, left, right);
    }
  }

  // Called after the slices of a step.
  __device__ __forceinline__ void end_step() {
    if constexpr (kSplit) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) value[i][j][e] += step[i][j][e], step[i][j][e] = 0;
        }
      }
    }
  }

  // Where value[i][j][e] lies in the warp's share.
  __device__ __forceinline__ static int row(int i, int e) {
    return 16 * i + static_cast<int>(threadIdx.x) % kWarp / 4 + e / 2 * 8;
  }
  __device__ __forceinline__ static int column(int j, int e) {
    return 8 * j + static_cast<int>(threadIdx.x) % 4 * 2 + e % 2;
  }
};

}  // namespace dcn::cuda
