// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// What the kernels of deform_conv2d read, and where a sample falls. Images are channels_last, so that neighbouring
// threads read neighbouring channels; the other operands are read as they lie.
#pragma once

#include "cuda/launch.cuh"
#include "deform_conv2d.h"

namespace dcn::cuda {

// A tensor (batch, channels, positions) with any strides.
template <typename T>
struct PlanesView {
  T* data;
  int64_t image_stride, channel_stride, position_stride;

  __device__ __forceinline__ T& at(int64_t image, int64_t channel, int64_t position) const {
    return data[image * image_stride + channel * channel_stride + position * position_stride];
  }
};

// The weight with any strides: output channels, counted over all conv groups, by input channels of one group, by taps.
template <typename T>
struct WeightsView {
  T* data;
  int64_t output_stride, channel_stride, tap_stride;

  __device__ __forceinline__ T& at(int64_t output, int64_t channel, int64_t tap) const {
    return data[output * output_stride + channel * channel_stride + tap * tap_stride];
  }
};

// Where the gradients by offset and mask go.
template <typename T>
struct SampleGradientsView {
  PlanesView<T> offsets, masks;  // shaped as offset and mask; masks.data is null where there is no mask
};

// What the kernels read.
template <typename T>
struct OperandsView {
  DeformConv2dSizes sizes;
  int64_t segment;  // neighbouring channels in the same conv group and the same deform group: gcd of the two
  const T* images;  // (batch, pixels, channels)
  PlanesView<const T> offsets;   // (batch, deform_groups * taps * 2, positions)
  PlanesView<const T> masks;     // (batch, deform_groups * taps, positions); its data is null where there is none
  bool logits;                   // the masks are logits of the modulation
  WeightsView<const T> weights;  // (out_channels, group_channels, taps)

  __device__ __forceinline__ const T* image(int64_t n) const { return images + n * sizes.pixels() * sizes.channels; }
};

// Where one sample falls and by how much it counts.
template <typename A>
struct Place {
  AxisSample<A> y, x;
  A modulation;
};

// The derivative of the modulation by the mask, or by its logits if the caller gave those.
template <typename T, typename A>
__device__ __forceinline__ A modulation_slope(const OperandsView<T>& operands, A modulation) {
  return operands.logits ? modulation * (A(1) - modulation) : A(1);
}

// Where a sample falls. Nothing else reads offsets and masks. Index is int where indices fit: that is cheaper to
// divide.
template <typename A, typename T, typename Index>
__device__ __forceinline__ Place<A> place_sample(const OperandsView<T>& operands, Index image, Index position,
                                                 Index deform_group, Index tap) {
  const DeformConv2dSizes& s = operands.sizes;
  const Index out_w = static_cast<Index>(s.out_w), kernel_w = static_cast<Index>(s.kernel_w);
  const Index channel = deform_group * static_cast<Index>(s.taps()) + tap;
  const T* offset = &operands.offsets.at(image, 2 * int64_t{channel}, position);
  const A offset_y = static_cast<A>(offset[0]), offset_x = static_cast<A>(offset[operands.offsets.channel_stride]);
  A modulation = operands.masks.data ? static_cast<A>(operands.masks.at(image, channel, position)) : A(1);
  if (operands.logits) modulation = reciprocal(A(1) + std::exp(-modulation));
  return {sample_axis_zeros(tap_y<A>(s, position / out_w, tap / kernel_w) + offset_y, static_cast<int32_t>(s.height)),
          sample_axis_zeros(tap_x<A>(s, position % out_w, tap % kernel_w) + offset_x, static_cast<int32_t>(s.width)),
          modulation};
}

}  // namespace dcn::cuda
