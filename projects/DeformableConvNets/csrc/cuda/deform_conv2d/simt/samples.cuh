// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Where a tile of output positions samples, for the kernels without tensor cores.
#pragma once

#include "cuda/deform_conv2d/sampling/operands.cuh"
#include "cuda/deform_conv2d/simt/tile.cuh"

namespace dcn::cuda {

// Up to kTile output positions of one image.
struct PositionTile {
  int64_t image, begin, count;
};
DCN_HOST_DEVICE int64_t position_tiles(const DeformConv2dSizes& s) { return s.batch * divide_up(s.positions(), kTile); }
DCN_HOST_DEVICE PositionTile position_tile(const DeformConv2dSizes& s, int64_t index) {
  const int64_t each = divide_up(s.positions(), kTile), begin = index % each * kTile;
  const int64_t left = s.positions() - begin;
  return {index / each, begin, left < kTile ? left : kTile};
}

// The four pixels that a sample reads, top left, top right, bottom left, bottom right; -1 where there is none.
template <typename A>
struct Corners {
  int32_t pixel[4];
  A weight[4];  // modulated by the mask
};

// The derivatives of Corners::weight.
template <typename A>
struct CornerDerivatives {
  A by_y[4], by_x[4], by_mask[4];
};

// Locates the samples of one tap for a tile of positions; those beyond its end read nothing. `derivatives` may be null.
template <typename T, typename A>
__device__ __forceinline__ void locate(const OperandsView<T>& operands, const PositionTile& tile, int64_t deform_group,
                                       int64_t tap, Corners<A>* corners, CornerDerivatives<A>* derivatives) {
  const DeformConv2dSizes& s = operands.sizes;
  const int index = threadIdx.x;
  if (index >= kTile) return;
  Place<A> place{no_sample<A>(), no_sample<A>(), 1};
  if (index < tile.count) place = place_sample<A>(operands, tile.image, tile.begin + index, deform_group, tap);
  const auto& [y, x, modulation] = place;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int row = k / 2, column = k % 2;
    const bool exists = y.exists[row] && x.exists[column];
    corners[index].pixel[k] = exists ? (y.low + row) * static_cast<int32_t>(s.width) + x.low + column : -1;
    corners[index].weight[k] = y.weight[row] * x.weight[column] * modulation;
    if (derivatives) {
      derivatives[index].by_y[k] = y.slope[row] * x.weight[column] * modulation;
      derivatives[index].by_x[k] = y.weight[row] * x.slope[column] * modulation;
      derivatives[index].by_mask[k] = y.weight[row] * x.weight[column] * modulation_slope(operands, modulation);
    }
  }
}

// The value of a sample. `channel` points to its channel in the image's first pixel.
template <typename T, typename A>
__device__ __forceinline__ A read_sample(const T* channel, int64_t channels, const Corners<A>& corners) {
  A value = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t pixel = corners.pixel[k];
    if (pixel >= 0) value += corners.weight[k] * static_cast<A>(channel[pixel * channels]);
  }
  return value;
}

}  // namespace dcn::cuda
