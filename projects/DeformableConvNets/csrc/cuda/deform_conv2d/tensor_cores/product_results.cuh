// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// How the results of a product on tensor cores get to memory: directly, or, where the sum is split, through partial
// results that are added up afterwards.
#pragma once

#include "cuda/deform_conv2d/tensor_cores/product_sizes.cuh"

namespace dcn::cuda {

// Writes a warp's share of a tile to memory, with the bias added: through shared memory, so that neighbouring threads
// write neighbouring elements.
template <Kind kKind, int kColumns, int kThreads, typename Product>
__device__ __forceinline__ void store_tile(const ProductSizes& sizes, const ProductOutput<Element<kKind>>& output,
                                           const Product& product, int warp_row, int warp_column,
                                           const ProductTile& tile, unsigned char* shared, int* places) {
  const int row_begin = tile.row, column_begin = tile.column(), columns = tile.columns;
  using T = Element<kKind>;
  constexpr int kVector = kChunkElements<kKind>;
  T* staged = reinterpret_cast<T*>(shared);
  const bool channels_last = output.planes.channel_stride == 1;
  const int row_pitch = channels_last ? kColumns + kVector : 1,
            column_pitch = channels_last ? 1 : kProductRows + kVector;
  constexpr int kRowFragments = WarpGrid<kColumns, kThreads>::kWarpRows / 16;
  constexpr int kColumnFragments = WarpGrid<kColumns, kThreads>::kWarpColumns / 8;
#pragma unroll
  for (int j = 0; j < kColumnFragments; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = warp_column + product.column(j, e);
      const float bias =
          output.bias && column < columns ? static_cast<float>(output.bias[column_begin + column]) : 0.0f;
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) {
        staged[(warp_row + product.row(i, e)) * row_pitch + column * column_pitch] =
            static_cast<T>(product.value[i][j][e] + bias);
      }
    }
  }
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kProductRows) {
    const int row = row_begin + thread;
    places[thread] = row / sizes.image_rows * sizes.image_rows + sizes.place(row);
  }
  __syncthreads();
  const int rows = sizes.rows - row_begin < kProductRows ? sizes.rows - row_begin : kProductRows;
  if (channels_last) {
    // In a channels_last tensor, an image's last place is followed by the next one's first.
    T* first = output.planes.data + column_begin;
    const bool aligned = sizes.columns % kVector == 0 && column_begin % kVector == 0;
    for (int at = thread; at < kProductRows * (kColumns / kVector); at += kThreads) {
      const int row = at / (kColumns / kVector), column = at % (kColumns / kVector) * kVector;
      if (row >= rows || column >= columns) continue;
      T* to = first + int64_t{places[row]} * sizes.columns + column;
      const T* from = staged + row * row_pitch + column;
      if (aligned && column + kVector <= columns) {
        store_chunk(to, *reinterpret_cast<const Chunk*>(from));
      } else {
        for (int e = 0; e < kVector && column + e < columns; ++e) to[e] = from[e];
      }
    }
  } else {
    const int row = thread % kProductRows;
    const int image = places[row] / sizes.image_rows, position = places[row] % sizes.image_rows;
    for (int column = thread / kProductRows; column < columns && column < kColumns; column += kThreads / kProductRows) {
      if (row < rows) {
        output.planes.at(image, column_begin + column, position) = staged[row + column * column_pitch];
      }
    }
  }
}

constexpr int kFinishTile = 32;

// Adds up the partial results in their order, and the bias. A block writes tiles of 32 rows by 32 columns, with 8 rows
// of threads.
template <typename T>
__global__ void __launch_bounds__(256, 1) finish_kernel(const ProductSizes sizes, const ProductOutput<T> output) {
  struct Shared {
    float value[kFinishTile][kFinishTile + 1];
  };
  DCN_SHARED(Shared, shared);
  const int x = static_cast<int>(threadIdx.x) % kFinishTile, y = static_cast<int>(threadIdx.x) / kFinishTile;
  const int64_t column_tiles = divide_up(sizes.columns, kFinishTile);
  const bool channels_last = output.planes.channel_stride == 1;
  for (int64_t work = blockIdx.x; work < divide_up(sizes.rows, kFinishTile) * column_tiles; work += gridDim.x) {
    const int64_t row_begin = work / column_tiles * kFinishTile, column_begin = work % column_tiles * kFinishTile;
    for (int i = y; i < kFinishTile; i += 8) {
      const int64_t row = row_begin + i, column = column_begin + x;
      if (row >= sizes.rows || column >= sizes.columns) continue;
      float sum = output.bias ? static_cast<float>(output.bias[column]) : 0.0f;
      for (int k = 0; k < sizes.splits; ++k)
        sum += output.partials[(int64_t{k} * sizes.rows + row) * sizes.columns + column];
      if (channels_last) {
        const int image = static_cast<int>(row) / sizes.image_rows, place = sizes.place(static_cast<int>(row));
        output.planes.at(image, column, place) = static_cast<T>(sum);
      } else {
        shared.value[i][x] = sum;
      }
    }
    if (channels_last) continue;
    __syncthreads();
    for (int i = y; i < kFinishTile; i += 8) {
      const int64_t row = row_begin + x, column = column_begin + i;
      if (row >= sizes.rows || column >= sizes.columns) continue;
      const int image = static_cast<int>(row) / sizes.image_rows, place = sizes.place(static_cast<int>(row));
      output.planes.at(image, column, place) = static_cast<T>(shared.value[x][i]);
    }
    __syncthreads();
  }
}

// The same for channels_last results whose columns are a multiple of kFinishTogether: a thread adds up as many columns.
constexpr int kFinishTogether = 4;

template <typename T>
__global__ void __launch_bounds__(256) finish_together_kernel(const ProductSizes sizes, const ProductOutput<T> output) {
  struct alignas(kFinishTogether * sizeof(T)) Together {
    T value[kFinishTogether];
  };
  // Sums are split only where partial results are small, so 31 bits can count all of them.
  const int count = sizes.rows * sizes.columns;
  for (int64_t chunk = int64_t{blockIdx.x} * 256 + threadIdx.x; chunk < count / kFinishTogether;
       chunk += int64_t{gridDim.x} * 256) {
    const int at = static_cast<int>(chunk) * kFinishTogether, row = at / sizes.columns;
    const int column = at - row * sizes.columns;
    float sum[kFinishTogether] = {};
    if (output.bias) {
#pragma unroll
      for (int e = 0; e < kFinishTogether; ++e) sum[e] = static_cast<float>(output.bias[column + e]);
    }
#pragma unroll 4
    for (int k = 0; k < sizes.splits; ++k) {
      const Chunk loaded = load_chunk(output.partials + int64_t{k} * count + at);
#pragma unroll
      for (int e = 0; e < kFinishTogether; ++e) sum[e] += bits_to_float(loaded.word[e]);
    }
    Together together;
#pragma unroll
    for (int e = 0; e < kFinishTogether; ++e) together.value[e] = static_cast<T>(sum[e]);
    *reinterpret_cast<Together*>(&output.planes.at(row / sizes.image_rows, column, sizes.place(row))) = together;
  }
}

// Launches what adds up partial results.
template <typename T>
void add_partials(const DeviceScope& device, const ProductSizes& sizes, const ProductOutput<T>& output) {
  if (output.planes.channel_stride == 1 && sizes.columns % kFinishTogether == 0) {
    const int64_t chunks = int64_t{sizes.rows} * sizes.columns / kFinishTogether;
    DCN_LAUNCH(finish_together_kernel<T>, std::min(divide_up(chunks, 256), kMaxBlocks), 256, device.stream(), sizes,
               output);
  } else {
    const int64_t tiles = divide_up(sizes.rows, kFinishTile) * divide_up(sizes.columns, kFinishTile);
    DCN_LAUNCH(finish_kernel<T>, std::min(tiles, kMaxBlocks), 256, device.stream(), sizes, output);
  }
}

}  // namespace dcn::cuda
