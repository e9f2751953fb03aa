// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Bilinear sampling: which pixels a sample reads, with which weights, and how these change as it moves. The CPU and the
// CUDA sources share it. Where samples fall is in the operators' headers, deform_conv2d.h and deform_*roi_pool.h.
//
// Bilinear sampling is the product of two axes, so everything here is about one axis. A sample in the plane reads
// its (up to) four neighbours with weight y.weight[i] * x.weight[j]; its derivative by the position in y is
// y.slope[i] * x.weight[j], by x it is y.weight[i] * x.slope[j]. An axis on which the sample falls outside has
// no neighbours and zero weights, so the product vanishes, NaN and infinite positions included.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DCN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DCN_HOST_DEVICE inline
#endif

namespace dcn {

// One axis of a bilinear sample: neighbours low and low + 1.
template <typename T>
struct AxisSample {
  int32_t low;     // index of the lower neighbour; may be -1 where exists[0] is false
  bool exists[2];  // whether each neighbour lies on the map; one that does not must not be read
  T weight[2];     // zero where the neighbour does not exist
  T slope[2];      // derivative of weight by the position
};

template <typename T>
DCN_HOST_DEVICE AxisSample<T> no_sample() {
  return {0, {false, false}, {T(0), T(0)}, {T(0), T(0)}};
}

// The rule of deformable convolution: zeros outside, contributes only for -1 < position < size.
template <typename T>
DCN_HOST_DEVICE AxisSample<T> sample_axis_zeros(T position, int32_t size) {
  // Written so that NaN fails the test, and without branches, so that compilers can vectorise over samples.
  const bool inside = position > T(-1) && position < T(size);
  const T safe = inside ? position : T(0);
  const T floor_position = std::floor(safe);
  const T fraction = safe - floor_position;
  AxisSample<T> axis;
  axis.low = static_cast<int32_t>(floor_position);
  axis.exists[0] = inside && axis.low >= 0;
  axis.exists[1] = inside && axis.low + 1 < size;
  axis.weight[0] = axis.exists[0] ? T(1) - fraction : T(0);
  axis.weight[1] = axis.exists[1] ? fraction : T(0);
  axis.slope[0] = axis.exists[0] ? T(-1) : T(0);
  axis.slope[1] = axis.exists[1] ? T(1) : T(0);
  return axis;
}

// The rule of RoIAlign: contributes for -1 <= position <= size, clamped to the map, where the slope is zero.
template <typename T>
DCN_HOST_DEVICE AxisSample<T> sample_axis_clamped(T position, int32_t size) {
  if (!(position >= T(-1) && position <= T(size)) || size < 1) return no_sample<T>();
  if (position < T(0)) return {0, {true, false}, {T(1), T(0)}, {T(0), T(0)}};
  if (position >= T(size - 1)) return {size - 1, {true, false}, {T(1), T(0)}, {T(0), T(0)}};
  const auto low = static_cast<int32_t>(position);  // the floor, as the position is not negative
  const T fraction = position - T(low);
  return {low, {true, true}, {T(1) - fraction, fraction}, {T(-1), T(1)}};
}

// The rule of position-sensitive RoI pooling: contributes for -0.5 <= position <= size - 0.5, clamped to the map. Its
// neighbours are floor and ceil of the position, so the slope is zero where they coincide.
template <typename T>
DCN_HOST_DEVICE AxisSample<T> sample_axis_half_pixel(T position, int32_t size) {
  if (!(position >= T(-0.5) && position <= T(size) - T(0.5)) || size < 1) return no_sample<T>();
  const T last = T(size - 1);
  const T clamped = position < T(0) ? T(0) : position > last ? last : position;
  const auto below = static_cast<int32_t>(clamped);  // the floor, as it is not negative
  const T fraction = clamped - T(below);
  // In a map longer than 2^24, float32 may round the last index up to one past it.
  const int32_t low = below < size ? below : size - 1;
  if (fraction == T(0)) return {low, {true, false}, {T(1), T(0)}, {T(0), T(0)}};
  return {low, {true, true}, {T(1) - fraction, fraction}, {T(-1), T(1)}};
}

}  // namespace dcn
