// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Operands of deform_roi_pool: sizes and checks that the CPU and the CUDA entry points share.
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

// One RoI in feature-map pixels, with the sampling grid that its undeformed box asks for.
template <typename T>
struct Roi {
  T image;  // index of its image, as given
  RoiAxis<T> y, x;

  DCN_HOST_DEVICE T count() const {
    const T samples = T(y.grid) * T(x.grid);
    return samples > T(1) ? samples : T(1);
  }
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

inline RoiPoolSizes sizes_of(const DeformRoiPoolSizes& s) {
  return {s.batch, s.height, s.width, s.rois, s.channels, s.out_h, s.out_w, 1, 1, s.out_h * s.out_w};
}

// Raises an error that names the operand and both values where something does not fit.
inline DeformRoiPoolSizes check_deform_roi_pool(const Tensor& input, const Tensor& rois,
                                                const std::optional<Tensor>& offset, const std::optional<Tensor>& mask,
                                                const std::vector<int64_t>& output_size, double spatial_scale,
                                                int64_t sampling_ratio, double gamma) {
  const char* op = "deform_roi_pool";
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
