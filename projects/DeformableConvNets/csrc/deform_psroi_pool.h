// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_psroi_pool: the sizes of its operands, their checks, and where its bins sample. The CPU and the CUDA sources
// share all of it.
#pragma once

#include "roi_pool_sizes.h"
#include "sample.h"
#include "tensor.h"

namespace dcn {

// input (batch, out_channels * group_size^2, height, width), rois (rois, 5),
// offset (rois, 2 * classes, part_h, part_w) in (x, y) order, mask (rois, 1, out_h, out_w),
// output (rois, out_channels, out_h, out_w). Each class moves out_channels / classes channels.
struct DeformPsRoiPoolSizes {
  int64_t batch, height, width;
  int64_t rois, out_channels, out_h, out_w;
  double spatial_scale;
  int64_t group_size, part_h, part_w, samples, classes;
  double trans_std;

  DCN_HOST_DEVICE int64_t cells() const { return group_size * group_size; }
  DCN_HOST_DEVICE int64_t class_channels() const { return out_channels / classes; }
  // The group of input channels that bin (h, w) reads: input channel = output channel * cells() + cell.
  DCN_HOST_DEVICE int64_t cell(int64_t h, int64_t w) const {
    return h * group_size / out_h * group_size + w * group_size / out_w;
  }
  // The offset of the part_h x part_w plane that moves bin (h, w).
  DCN_HOST_DEVICE int64_t offset_cell(int64_t h, int64_t w) const {
    return h * part_h / out_h * part_w + w * part_w / out_w;
  }
};

// One axis of a RoI in feature-map pixels: its corners are rounded to whole image pixels, half away from zero, and
// include the last pixel; it is at least 0.1 feature-map pixels long.
template <typename T>
struct PsRoiAxis {
  T start, size, bin_size, sample_size;
};

template <typename T>
DCN_HOST_DEVICE PsRoiAxis<T> psroi_axis(T low, T high, T spatial_scale, int64_t bins, int64_t samples) {
  PsRoiAxis<T> axis;
  axis.start = std::round(low) * spatial_scale - T(0.5);
  const T size = (std::round(high) + T(1)) * spatial_scale - T(0.5) - axis.start;
  // A RoI that is not finite has no samples, as its positions are NaN: x - x is 0 for finite x only.
  if (!(size - size == T(0))) axis.start = size - size;
  axis.size = size < T(0.1) ? T(0.1) : size;
  axis.bin_size = axis.size / T(bins);
  axis.sample_size = axis.bin_size / T(samples);
  return axis;
}

// Position of sample k of a bin whose offset is `offset`: where the k-th of the bin's equal pieces begins, not its
// middle.
template <typename T>
DCN_HOST_DEVICE T psroi_sample_position(const PsRoiAxis<T>& axis, int64_t bin, int64_t k, T offset, T trans_std) {
  return T(bin) * axis.bin_size + axis.start + offset * trans_std * axis.size + T(k) * axis.sample_size;
}

// Where bins sample; roi_pool_sizes.h says what each member means.
template <typename T>
struct DeformPsRoiPoolGeometry {
  DeformPsRoiPoolSizes sizes;

  struct Samples {
    PsRoiAxis<T> axis;
    int32_t map_size;
    int64_t bin;
    T offset, trans_std;
    SampleRange range;

    DCN_HOST_DEVICE AxisSample<T> operator()(int64_t k) const {
      return sample_axis_half_pixel(psroi_sample_position(axis, bin, k, offset, trans_std), map_size);
    }
  };
  struct Axis {
    PsRoiAxis<T> axis;
    int32_t map_size;
    int64_t count;
    T trans_std, unit;

    DCN_HOST_DEVICE Samples samples(int64_t bin, T offset) const {
      return {axis, map_size, bin, offset, trans_std, {0, count}};
    }
    // Samples off the map do not count.
    template <typename Count>
    DCN_HOST_DEVICE int64_t divisor(const Count& on_map) const {
      return on_map();
    }
  };

  DCN_HOST_DEVICE Axis axis(const T* row, bool column) const {
    const T scale = static_cast<T>(sizes.spatial_scale), trans_std = static_cast<T>(sizes.trans_std);
    const PsRoiAxis<T> axis = column ? psroi_axis(row[1], row[3], scale, sizes.out_w, sizes.samples)
                                     : psroi_axis(row[2], row[4], scale, sizes.out_h, sizes.samples);
    const auto map_size = static_cast<int32_t>(column ? sizes.width : sizes.height);
    return {axis, map_size, sizes.samples, trans_std, trans_std * axis.size};
  }
  DCN_HOST_DEVICE static T average(T divisor) { return divisor > T(0) ? T(1) / divisor : T(0); }
  DCN_HOST_DEVICE int64_t cell(int64_t h, int64_t w) const { return sizes.cell(h, w); }
  DCN_HOST_DEVICE int64_t offset_cell(int64_t h, int64_t w) const { return sizes.offset_cell(h, w); }
  DCN_HOST_DEVICE bool own_offsets() const { return sizes.part_h == sizes.out_h && sizes.part_w == sizes.out_w; }
};

inline RoiPoolSizes sizes_of(const DeformPsRoiPoolSizes& s) {
  return {s.batch, s.height, s.width,   s.rois,    s.out_channels,
          s.out_h, s.out_w,  s.cells(), s.classes, s.part_h * s.part_w};
}

// Raises an error that names the operand and both values where something does not fit.
inline DeformPsRoiPoolSizes check_deform_psroi_pool(const RoiPoolInputs& given, const std::vector<int64_t>& output_size,
                                                    double spatial_scale, int64_t group_size,
                                                    const std::optional<std::vector<int64_t>>& part_size,
                                                    int64_t sample_per_part, double trans_std) {
  const char* op = "deform_psroi_pool";
  const auto& [input, rois, offset, mask] = given;
  check_input_dtype(op, input);
  check_operand(op, "input", input, input, 4);
  check_rois(op, rois, input);
  check_least(op, "output_size", output_size, 1);
  if (part_size) check_least(op, "part_size", *part_size, 1);
  DCN_CHECK(group_size >= 1, op, ": group_size must be at least 1, got ", group_size);
  DCN_CHECK(group_size <= kMostOfSize, op, ": group_size must be at most ", kMostOfSize, ", got ", group_size);
  DCN_CHECK(sample_per_part >= 1, op, ": sample_per_part must be at least 1, got ", sample_per_part);
  const std::vector<int64_t>& part = part_size ? *part_size : output_size;
  const int64_t cells = group_size * group_size, channels = input.size(1);
  DCN_CHECK(channels % cells == 0, op, ": input has ", channels,
            " channels, but needs a multiple of group_size^2 = ", cells);
  DeformPsRoiPoolSizes s{input.size(0),
                         input.size(2),
                         input.size(3),
                         rois.size(0),
                         channels / cells,
                         output_size[0],
                         output_size[1],
                         spatial_scale,
                         group_size,
                         part[0],
                         part[1],
                         sample_per_part,
                         1,
                         trans_std};
  if (offset) {
    check_operand(op, "offset", *offset, input, 4);
    s.classes = offset->size(1) / 2;
    DCN_CHECK(s.classes > 0 && offset->size(1) % 2 == 0 && s.out_channels % s.classes == 0, op, ": offset has ",
              offset->size(1), " channels, but needs 2 * classes, where classes divides the ", s.out_channels,
              " output channels");
    check_shape(op, "offset", *offset, {s.rois, offset->size(1), s.part_h, s.part_w});
  }
  if (mask) {
    check_operand(op, "mask", *mask, input, 4);
    check_shape(op, "mask", *mask, {s.rois, 1, s.out_h, s.out_w});
  }
  return s;
}

}  // namespace dcn
