// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Turns maps from contiguous to channels_last and back, and converts their dtype in the same pass: tile by tile, so
// that memory is read and written along rows.
#pragma once

#include "cuda/atomics.cuh"

namespace dcn::cuda {

constexpr int kLayoutThreads = 256;
constexpr int kLayoutTile = 64;  // rows and columns

// Reads the values of a dense tensor. The kernels below read through such a class.
template <typename T>
struct ReadValues {
  const T* values;
  __device__ __forceinline__ void prepare() {}
  __device__ __forceinline__ T operator()(int64_t i) const { return values[i]; }
};

// Reads sums in fixed point. `codes` holds the exponents whose sum bounds the terms, see find_largest_exponent.
template <typename A>
struct ReadFixed {
  const unsigned long long* sums;
  const int* codes;
  int log2_terms;
  FixedPoint<A> point = {};

  __device__ __forceinline__ void prepare() { point = FixedPoint<A>(codes, log2_terms); }
  __device__ __forceinline__ A operator()(int64_t i) const { return point.value(sums[i]); }
};

// to[i] = from(i)
template <typename To, typename Read>
__global__ void __launch_bounds__(kLayoutThreads, 1) convert_kernel(Read from, To* to, const int64_t count) {
  from.prepare();
  for (int64_t i = int64_t{blockIdx.x} * kLayoutThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kLayoutThreads) {
    to[i] = static_cast<To>(from(i));
  }
}

// to[b][column][row] = from[b][row][column]
template <typename To, typename Read>
__global__ void __launch_bounds__(kLayoutThreads, 1)
    transpose_kernel(Read from, To* to, const int64_t batch, const int64_t rows, const int64_t columns) {
  struct Shared {
    To tile[kLayoutTile][kLayoutTile + 1];  // the padding puts neighbours in either direction into different banks
  };
  DCN_SHARED(Shared, shared);
  constexpr int kStep = kLayoutThreads / kLayoutTile;
  const int across = threadIdx.x % kLayoutTile, first = threadIdx.x / kLayoutTile;
  const int64_t row_tiles = divide_up(rows, kLayoutTile), column_tiles = divide_up(columns, kLayoutTile);
  from.prepare();
  for (int64_t work = blockIdx.x; work < batch * row_tiles * column_tiles; work += gridDim.x) {
    const int64_t column = work % column_tiles * kLayoutTile, row = work / column_tiles % row_tiles * kLayoutTile;
    const int64_t begin = work / column_tiles / row_tiles * rows * columns;
#pragma unroll 4
    for (int i = first; i < kLayoutTile; i += kStep) {
      if (row + i < rows && column + across < columns) {
        shared.tile[i][across] = static_cast<To>(from(begin + (row + i) * columns + column + across));
      }
    }
    __syncthreads();
#pragma unroll 4
    for (int i = first; i < kLayoutTile; i += kStep) {
      if (column + i < columns && row + across < rows) {
        to[begin + (column + i) * rows + row + across] = shared.tile[across][i];
      }
    }
    __syncthreads();
  }
}

template <typename To, typename Read, typename Stream>
void convert(const Read& from, To* to, int64_t count, Stream stream) {
  if (count == 0) return;
  const auto kernel = convert_kernel<To, Read>;
  DCN_LAUNCH(kernel, std::min(divide_up(count, kLayoutThreads), kMaxBlocks), kLayoutThreads, stream, from, to, count);
}

template <typename To, typename Read, typename Stream>
void transpose(const Read& from, To* to, int64_t batch, int64_t rows, int64_t columns, Stream stream) {
  if (batch * rows * columns == 0) return;
  const int64_t tiles = batch * divide_up(rows, kLayoutTile) * divide_up(columns, kLayoutTile);
  const auto kernel = transpose_kernel<To, Read>;
  DCN_LAUNCH(kernel, std::min(tiles, kMaxBlocks), kLayoutThreads, stream, from, to, batch, rows, columns);
}

// A map in memory order (batch, cells, pixels, channels), where input channel = channel * cells + cell. With one cell
// that is channels_last, and a map which is so already is not copied.
template <typename T, typename Stream>
Tensor to_channels_last(const Tensor& map, int64_t cells, Stream stream) {
  const int64_t channels = map.size(1) / cells, pixels = map.size(2) * map.size(3);
  if (cells == 1 && (!map.is_contiguous() || channels == 1 || pixels == 1)) {
    return dense(map, map.scalar_type(), MemoryFormat::ChannelsLast);
  }
  const Tensor from = dense(map, map.scalar_type());
  Tensor to = torch::stable::new_empty(map, {map.numel()});
  transpose(ReadValues<T>{from.template const_data_ptr<T>()}, to.template mutable_data_ptr<T>(), map.size(0), channels,
            cells * pixels, stream);
  return to;
}

// The inverse of to_channels_last: a map of `like`'s shape, dtype and memory format, from values in that order.
template <typename T, typename Read, typename Stream>
Tensor from_channels_last(const Read& from, const Tensor& like, int64_t cells, Stream stream) {
  const int64_t channels = like.size(1) / cells, pixels = like.size(2) * like.size(3);
  const bool channels_last = is_channels_last(like), in_order = channels_last && cells == 1;
  Tensor map = empty_4d(like, {like.size(0), like.size(1), like.size(2), like.size(3)}, like.scalar_type(), in_order);
  T* to = map.template mutable_data_ptr<T>();
  if (in_order) {
    convert(from, to, map.numel(), stream);
  } else {
    transpose(from, to, like.size(0), cells * pixels, channels, stream);
  }
  return channels_last ? dense(map, like.scalar_type(), MemoryFormat::ChannelsLast) : map;
}

}  // namespace dcn::cuda
