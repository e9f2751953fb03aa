// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_roi_pool: the sizes of its operands, their checks, and where its bins sample. The CPU and the CUDA sources
// share all of it.
#pragma once

#include "roi_pool_sizes.h"
#include "sample.h"
#include "tensor.h"

namespace dcn {

// input (batch, channels, height, width), rois (rois, 5), offset (rois, 2, out_h, out_w) in (x, y) order,
// mask (rois, 1, out_h, out_w), output (rois, channels, out_h, out_w).
struct DeformRoiPoolSizes {
  int64_t batch, channels, height, width;
  int64_t rois, out_h, out_w;
  double spatial_scale;
  int64_t sampling_ratio;
  double gamma;
};

// The bins of a RoI along one axis, after Dai et al. 2017 section 2.2 with RoIAlign's half-pixel shift.
template <typename T>
struct RoiAxis {
  T start;  // where the first bin starts, in feature-map pixels
  T size;   // length of the RoI, in feature-map pixels
  T bin_size;
  int64_t grid;  // samples per bin, 0 where the RoI is empty or not finite
};

template <typename T>
DCN_HOST_DEVICE RoiAxis<T> roi_axis(T low, T high, T spatial_scale, int64_t bins, int64_t sampling_ratio) {
  RoiAxis<T> axis;
  axis.start = low * spatial_scale - T(0.5);
  axis.size = (high * spatial_scale - T(0.5)) - axis.start;
  axis.bin_size = axis.size / T(bins);
  const T most = T(1 << 30);  // keeps the conversion defined
  const T samples = std::ceil(axis.bin_size);
  axis.grid = sampling_ratio > 0 ? sampling_ratio
              : samples > T(0)   ? static_cast<int64_t>(samples < most ? samples : most)
                                 : 0;
  return axis;
}

// Position of sample k of a bin that is moved by `shift` feature-map pixels.
template <typename T>
DCN_HOST_DEVICE T roi_sample_position(const RoiAxis<T>& axis, int64_t bin, int64_t k, T shift) {
  return axis.start + (T(bin) + (T(k) + T(0.5)) / T(axis.grid)) * axis.bin_size + shift;
}

// The samples of a bin that may lie on the map; the others do not. It bounds the work of a RoI that is far larger than
// the map, and is empty where the shift is NaN or infinite.
template <typename T>
DCN_HOST_DEVICE SampleRange roi_sample_range(const RoiAxis<T>& axis, int64_t bin, T shift, int32_t size) {
  const T step = axis.bin_size / T(axis.grid);
  if (axis.grid <= 64 || !(step > T(0))) return {0, axis.grid};
  const T base = axis.start + T(bin) * axis.bin_size + shift;
  const T first = (T(-1) - base) / step, last = (T(size) - base) / step;
  // Rounding moves a sample by less than that many places.
  const T slack = T(2) + T(1e-6) * (std::fabs(first) + std::fabs(last));
  const T begin = first - slack, end = last + slack, grid = static_cast<T>(axis.grid);
  if (!(begin < grid && end > T(0))) return {0, 0};
  return {begin > T(0) ? static_cast<int64_t>(begin) : 0, end < grid ? static_cast<int64_t>(end) + 1 : axis.grid};
}

// One RoI in feature-map pixels, with the sampling grid that its undeformed box asks for.
template <typename T>
struct Roi {
  T image;  // index of its image, as given
  RoiAxis<T> y, x;
};

// `row` is one row of rois: batch index, x0, y0, x1, y1.
template <typename T>
DCN_HOST_DEVICE Roi<T> read_roi(const DeformRoiPoolSizes& s, const T* row) {
  const T scale = static_cast<T>(s.spatial_scale);
  Roi<T> roi{row[0], roi_axis(row[2], row[4], scale, s.out_h, s.sampling_ratio),
             roi_axis(row[1], row[3], scale, s.out_w, s.sampling_ratio)};
  // x - x is 0 for finite x only; isfinite is not available to both compilers under one name.
  const bool finite = roi.y.size - roi.y.size == T(0) && roi.x.size - roi.x.size == T(0);
  if (!finite) roi.y = roi.x = {T(0), T(0), T(0), 0};
  return roi;
}

// Where bins sample; roi_pool_sizes.h says what each member means.
template <typename T>
struct DeformRoiPoolGeometry {
  DeformRoiPoolSizes sizes;

  struct Samples {
    RoiAxis<T> axis;
    int32_t map_size;
    int64_t bin;
    T shift;
    SampleRange range;

    DCN_HOST_DEVICE AxisSample<T> operator()(int64_t k) const {
      return sample_axis_clamped(roi_sample_position(axis, bin, k, shift), map_size);
    }
  };
  struct Axis {
    RoiAxis<T> axis;
    int32_t map_size;
    T unit;

    DCN_HOST_DEVICE Samples samples(int64_t bin, T offset) const {
      const T shift = unit * offset;
      return {axis, map_size, bin, shift, roi_sample_range(axis, bin, shift, map_size)};
    }
    // Samples off the map count as zeros.
    template <typename Count>
    DCN_HOST_DEVICE int64_t divisor(const Count&) const {
      return axis.grid;
    }
  };

  DCN_HOST_DEVICE Axis axis(const T* row, bool column) const {
    const Roi<T> roi = read_roi(sizes, row);
    const RoiAxis<T> axis = column ? roi.x : roi.y;
    const auto map_size = static_cast<int32_t>(column ? sizes.width : sizes.height);
    return {axis, map_size, static_cast<T>(sizes.gamma) * axis.size};
  }
  DCN_HOST_DEVICE static T average(T divisor) { return divisor > T(0) ? T(1) / divisor : T(1); }
  DCN_HOST_DEVICE static int64_t cell(int64_t, int64_t) { return 0; }
  DCN_HOST_DEVICE int64_t offset_cell(int64_t h, int64_t w) const { return h * sizes.out_w + w; }
  DCN_HOST_DEVICE static bool own_offsets() { return true; }
};

inline RoiPoolSizes sizes_of(const DeformRoiPoolSizes& s) {
  return {s.batch, s.height, s.width, s.rois, s.channels, s.out_h, s.out_w, 1, 1, s.out_h * s.out_w};
}

// Raises an error that names the operand and both values where something does not fit.
inline DeformRoiPoolSizes check_deform_roi_pool(const RoiPoolInputs& given, const std::vector<int64_t>& output_size,
                                                double spatial_scale, int64_t sampling_ratio, double gamma) {
  const char* op = "deform_roi_pool";
  const auto& [input, rois, offset, mask] = given;
  check_input_dtype(op, input);
  check_operand(op, "input", input, input, 4);
  check_rois(op, rois, input);
  check_least(op, "output_size", output_size, 1);
  DCN_CHECK(sampling_ratio >= 0, op, ": sampling_ratio must be at least 0, got ", sampling_ratio);
  DeformRoiPoolSizes s{input.size(0),  input.size(1),  input.size(2), input.size(3),  rois.size(0),
                       output_size[0], output_size[1], spatial_scale, sampling_ratio, gamma};
  if (offset) {
    check_operand(op, "offset", *offset, input, 4);
    check_shape(op, "offset", *offset, {s.rois, 2, s.out_h, s.out_w});
  }
  if (mask) {
    check_operand(op, "mask", *mask, input, 4);
    check_shape(op, "mask", *mask, {s.rois, 1, s.out_h, s.out_w});
  }
  return s;
}

}  // namespace dcn
