// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// RoI pooling on CUDA: how the work is shared out, and which pixels a bin reads.
//
// The sum of a bin's samples factors into row weights times column weights, so that every pixel under a bin is read
// once, however many samples fall on it. A thread block has up to kBinTile bins of one RoI. Each of its warps first
// lists the rows and columns of its own bins, one lane for each axis of a bin. Then it goes from bin to bin, and its
// lanes share out the channels.
#pragma once

#include "cuda/memory_format.cuh"
#include "roi_pool_sizes.h"

namespace dcn::cuda {

constexpr int kBinTile = 16;
constexpr int kRoiWarps = 4;
constexpr int kRoiThreads = kRoiWarps * kWarp;
constexpr int kBinsPerWarp = kBinTile / kRoiWarps;
constexpr int kLaneChannels = 8;                      // channels of a lane at a time
constexpr int kPassChannels = kLaneChannels * kWarp;  // channels of a warp at a time
constexpr int kAxisSamples = 8;                       // samples of an axis at a time

// The operands of one call, dense.
template <typename T>
struct RoiPoolOperandsView {
  RoiPoolSizes sizes;
  const T* images;            // (batch, cells, pixels, channels)
  const Accumulate<T>* rois;  // (rois, 5)
  const T* offsets;           // (rois, channel_sets, 2, offset_cells), or null
  const T* masks;             // (rois, bins), or null

  // Whether a RoI names an image of the batch. If not, it gives NaN and no gradients: a kernel can raise an error only
  // by stopping the device.
  __device__ __forceinline__ bool on_image(int64_t roi) const {
    using A = Accumulate<T>;
    const A image = rois[5 * roi];
    return image >= A(0) && image < static_cast<A>(sizes.batch) && image == std::floor(image);
  }
};

// What a thread block works on: bins [begin, begin + count) of one RoI, for one set of channels. A RoI has less than
// 2^31 bins.
struct BinTile {
  int64_t roi;
  int channel_set, begin, count;

  __device__ __forceinline__ BinTile(const RoiPoolSizes& s, int64_t index) {
    const int64_t tiles = divide_up(s.bins(), kBinTile), row = index / tiles;
    roi = row / s.channel_sets, channel_set = static_cast<int>(row % s.channel_sets);
    begin = static_cast<int>(index % tiles) * kBinTile;
    const int left = static_cast<int>(s.bins()) - begin;
    count = left < kBinTile ? left : kBinTile;
  }
};
DCN_HOST_DEVICE int64_t bin_tiles(const RoiPoolSizes& s) {
  return s.rois * s.channel_sets * divide_up(s.bins(), kBinTile);
}

// A row or a column of pixels that samples of a bin touch.
template <typename A>
struct PixelLine {
  int64_t at;       // where its first pixel is, counted in values from the start of the cell's image
  A weight, slope;  // sums over the samples; `slope` is the derivative of `weight` by the bin's position
};

// What one axis of a bin reads, for one of its runs of up to kAxisSamples samples.
template <typename A>
struct AxisList {
  PixelLine<A> entries[2 * kAxisSamples];
  int count;
  int64_t runs;
  A average;  // factor of the sum: one over the number of samples
  A unit;     // pixels that an offset of 1 moves the bin by
};
template <typename A>
struct BinLists {
  AxisList<A> rows, columns;
  int64_t image;  // where the image begins that the bin reads, at the first channel of the tile's set
  A mask;

  // A bin is worked on pair by pair: a run of its rows and a run of its columns.
  __device__ __forceinline__ int64_t run_pairs() const { return rows.runs * columns.runs; }
  __device__ __forceinline__ A average() const { return rows.average * columns.average; }
  __device__ __forceinline__ A scale() const { return average() * mask; }
};

// Fills in `entries` from the samples of one run. Samples that follow each other share pixels, which stand in the list
// once. `stride` is the distance of neighbouring pixels.
template <typename A, typename Samples>
__device__ __forceinline__ void list_samples(AxisList<A>& list, const Samples& samples, int64_t run, int64_t stride) {
  int count = 0;
  // Pixels low and low + 1, which the last sample touched.
  int32_t low = 0;
  bool touched[2] = {false, false};
  A weight[2] = {0, 0}, slope[2] = {0, 0};
  const auto finish = [&](int side) {
    if (touched[side]) list.entries[count++] = {(int64_t{low} + side) * stride, weight[side], slope[side]};
    touched[side] = false, weight[side] = slope[side] = A(0);
  };
  const auto move = [&](int from, int to) {
    touched[to] = touched[from], weight[to] = weight[from], slope[to] = slope[from];
    touched[from] = false, weight[from] = slope[from] = A(0);
  };
  const int64_t begin = samples.range.begin + run * kAxisSamples;
#pragma unroll 1
  for (int64_t k = begin; k < begin + kAxisSamples && k < samples.range.end; ++k) {
    const AxisSample<A> sample = samples(k);
    if (!sample.exists[0] && !sample.exists[1]) continue;
    if (sample.low == low + 1) {
      finish(0), move(1, 0);
    } else if (sample.low == low - 1) {
      finish(1), move(0, 1);
    } else if (sample.low != low) {
      finish(0), finish(1);
    }
    low = sample.low;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      touched[side] |= sample.exists[side];
      weight[side] += sample.weight[side], slope[side] += sample.slope[side];
    }
  }
  finish(0), finish(1);
  list.count = count;
}

// Lists one axis of a bin, for one pair of runs.
template <typename T, template <typename> class Geometry>
__device__ __forceinline__ void list_axis(const RoiPoolOperandsView<T>& operands,
                                          const Geometry<Accumulate<T>>& geometry, const BinTile& tile, int b,
                                          bool column, int64_t pair, BinLists<Accumulate<T>>& lists) {
  using A = Accumulate<T>;
  const RoiPoolSizes& s = operands.sizes;
  const int out_w = static_cast<int>(s.out_w), h = (tile.begin + b) / out_w, w = (tile.begin + b) % out_w;
  A offset = 0;
  if (operands.offsets) {
    const int64_t plane = (tile.roi * s.channel_sets + tile.channel_set) * 2 + (column ? 0 : 1);  // x comes first
    offset = static_cast<A>(operands.offsets[plane * s.offset_cells + geometry.offset_cell(h, w)]);
  }
  const auto axis = geometry.axis(operands.rois + 5 * tile.roi, column);
  const auto samples = axis.samples(column ? w : h, offset);
  const int64_t divisor = axis.divisor([&] {
    int64_t count = 0;
#pragma unroll 1
    for (int64_t k = samples.range.begin; k < samples.range.end; ++k) count += samples(k).exists[0];  // the lower one
    return count;
  });
  AxisList<A>& list = column ? lists.columns : lists.rows;
  if (pair == 0) {
    list.runs = divide_up(samples.range.end - samples.range.begin, kAxisSamples);
    list.average = geometry.average(static_cast<A>(divisor));
    // A bin without samples has no shift to differentiate by; that of a RoI that is not finite would be NaN.
    list.unit = divisor > 0 ? axis.unit : A(0);
    if (column) {
      const int64_t image = static_cast<int64_t>(operands.rois[5 * tile.roi]) * s.cells + geometry.cell(h, w);
      lists.image = image * s.pixels() * s.channels + tile.channel_set * s.set_channels();
    } else {
      lists.mask = operands.masks ? static_cast<A>(operands.masks[tile.roi * s.bins() + tile.begin + b]) : A(1);
    }
  }
  const int64_t columns = pair > 0 && lists.columns.runs > 0 ? lists.columns.runs : 1;
  list_samples(list, samples, column ? pair % columns : pair / columns, column ? s.channels : s.channels * s.width);
}

// Lists the bins of this warp, every kRoiWarps-th of the tile. Returns whether any of them has another pair of
// runs after `pair`; most have one only.
template <typename T, template <typename> class Geometry>
__device__ __forceinline__ bool list_bins(const RoiPoolOperandsView<T>& operands,
                                          const Geometry<Accumulate<T>>& geometry, const BinTile& tile, int64_t pair,
                                          BinLists<Accumulate<T>>* lists) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, b = warp + lane / 2 * kRoiWarps;
  __syncwarp();  // the lists of the last pair have been read
  if (lane < 2 * kBinsPerWarp && b < tile.count) {
    list_axis<T, Geometry>(operands, geometry, tile, b, lane % 2, pair, lists[b]);
  }
  __syncwarp();
  bool more = false;
  for (int i = warp; i < tile.count; i += kRoiWarps) more |= pair + 1 < lists[i].run_pairs();
  return more;
}

// Calls visit(row, column) for all pairs of a listed row and a listed column of a bin, kUnrolled of them at a time.
template <int kUnrolled, typename A, typename Visit>
__device__ __forceinline__ void for_each_pixel(const BinLists<A>& lists, const Visit& visit) {
  for (int i = 0; i < lists.rows.count; ++i) {
    const PixelLine<A> row = lists.rows.entries[i];
#pragma unroll kUnrolled
    for (int j = 0; j < lists.columns.count; ++j) visit(row, lists.columns.entries[j]);
  }
}

// Neighbouring values that a lane reads or writes at once.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T value[kCount];
};

// The channels of a lane in a pass over kPassChannels channels: vectors of kVector channels. The vectors of
// neighbouring lanes lie side by side.
template <int kVector>
struct LaneChannels {
  static constexpr int kVectors = kLaneChannels / kVector;

  // The first channel of its v-th vector.
  __device__ __forceinline__ static int channel(int v) { return (v * kWarp + threadIdx.x % kWarp) * kVector; }
};

}  // namespace dcn::cuda
