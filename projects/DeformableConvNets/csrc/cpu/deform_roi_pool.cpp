// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_roi_pool on CPU. The samples of a bin form an axis-aligned grid, so their sum factors into row weights times
// column weights: every pixel under a bin is read once, however many samples fall on it.
#include "deform_roi_pool.h"

#include "kernels.h"
#include "tiles.h"

namespace dcn::cpu {
namespace {

// The sum of a bin's samples along one axis: the pixels that they touch, each once.
template <typename T>
struct AxisSum {
  struct Entry {
    int32_t pixel;
    T weight, slope;
  };
  std::vector<Entry> entries;

  // Adds up the samples of bin `bin`, moved by `shift` pixels, on an axis of `size` pixels.
  void set(const RoiAxis<T>& axis, int64_t bin, T shift, int32_t size) {
    entries.clear();
    const SampleRange range = roi_sample_range(axis, bin, shift, size);
    for (int64_t k = range.begin; k < range.end; ++k) {
      const AxisSample<T> sample = sample_axis_clamped(roi_sample_position(axis, bin, k, shift), size);
      for (int side = 0; side < 2; ++side) {
        if (sample.exists[side]) add(sample.low + side, sample.weight[side], sample.slope[side]);
      }
    }
  }

 private:
  void add(int32_t pixel, T weight, T slope) {
    // Positions rise from sample to sample, so a pixel that is met again is one of the last two.
    for (size_t back = 1; back <= 2 && back <= entries.size(); ++back) {
      Entry& entry = entries[entries.size() - back];
      if (entry.pixel == pixel) {
        entry.weight += weight;
        entry.slope += slope;
        return;
      }
    }
    entries.push_back({pixel, weight, slope});
  }
};

template <typename T>
struct Operands {
  Tensor image_tensor, roi_tensor;
  std::optional<Tensor> offset_tensor, mask_tensor;
  DeformRoiPoolSizes sizes;
  const T *images, *rois, *offsets = nullptr, *masks = nullptr;

  Operands(const DeformRoiPoolSizes& s, const Tensor& input, const Tensor& roi_rows,
           const std::optional<Tensor>& offset, const std::optional<Tensor>& mask)
      : image_tensor(dense(input, scalar_type_of<T>(), MemoryFormat::ChannelsLast)),
        roi_tensor(dense(roi_rows, scalar_type_of<T>())),
        sizes(s) {
    images = image_tensor.template const_data_ptr<T>();
    rois = roi_tensor.template const_data_ptr<T>();
    if (offset)
      offset_tensor = dense(*offset, scalar_type_of<T>()), offsets = offset_tensor->template const_data_ptr<T>();
    if (mask) mask_tensor = dense(*mask, scalar_type_of<T>()), masks = mask_tensor->template const_data_ptr<T>();
    for (int64_t r = 0; r < s.rois; ++r) {
      const T image = rois[5 * r];
      STD_TORCH_CHECK(image >= T(0) && image < static_cast<T>(s.batch), "deform_roi_pool: rois[", r, "] names image ",
                      image, ", but input has ", s.batch, " images");
    }
  }

  int64_t bins() const { return sizes.out_h * sizes.out_w; }
  int64_t image_begin(T image) const {
    return static_cast<int64_t>(image) * sizes.height * sizes.width * sizes.channels;
  }
};

// One bin of one RoI: which pixels it reads with which weights.
template <typename T>
class Bin {
 public:
  void set(const Operands<T>& o, int64_t r, const Roi<T>& roi, int64_t bin) {
    const DeformRoiPoolSizes& s = o.sizes;
    const int64_t h = bin / s.out_w, w = bin % s.out_w;
    const T gamma = static_cast<T>(s.gamma);
    const T* offset = o.offsets ? o.offsets + r * 2 * o.bins() + bin : nullptr;
    shift_x = gamma * roi.x.size, shift_y = gamma * roi.y.size;
    rows.set(roi.y, h, offset ? shift_y * offset[o.bins()] : T(0), static_cast<int32_t>(s.height));
    columns.set(roi.x, w, offset ? shift_x * offset[0] : T(0), static_cast<int32_t>(s.width));
    modulation = o.masks ? o.masks[r * o.bins() + bin] : T(1);
    average = T(1) / roi.count();
  }

  // Calls visit(pixel, row, column) for every pixel of the bin.
  template <typename Visit>
  void for_each_pixel(int64_t width, const Visit& visit) const {
    for (const auto& row : rows.entries) {
      for (const auto& column : columns.entries) visit(row.pixel * width + column.pixel, row, column);
    }
  }

  AxisSum<T> rows, columns;
  T shift_y, shift_x;  // pixels that an offset of 1 moves the bin by
  T modulation, average;
};

template <typename T>
Tensor forward(const DeformRoiPoolSizes& s, const Tensor& input, const Tensor& rois,
               const std::optional<Tensor>& offset, const std::optional<Tensor>& mask) {
  Tensor output = empty_4d(input, {s.rois, s.channels, s.out_h, s.out_w}, scalar_type_of<T>(), false);
  if (output.numel() == 0) return output;
  const Operands<T> operands(s, input, rois, offset, mask);
  T* out = output.template mutable_data_ptr<T>();
  torch::stable::parallel_for(0, s.rois, 1, [&](int64_t first, int64_t last) {
    Bin<T> bin;
    const int64_t bins = operands.bins();
    std::vector<T> pooled(s.channels * bins);
    for (int64_t r = first; r < last; ++r) {
      const Roi<T> roi = read_roi(s, operands.rois + 5 * r);
      const T* image = operands.images + operands.image_begin(roi.image);
      std::fill(pooled.begin(), pooled.end(), T(0));
      for (int64_t b = 0; b < bins; ++b) {
        bin.set(operands, r, roi, b);
        bin.for_each_pixel(s.width, [&](int64_t pixel, const auto& row, const auto& column) {
          const T weight = row.weight * column.weight * bin.average * bin.modulation;
          kernels<T>().add_scaled(pooled.data() + b * s.channels, image + pixel * s.channels, weight, s.channels);
        });
      }
      for (int64_t c = 0; c < s.channels; ++c) {
        for (int64_t b = 0; b < bins; ++b) out[(r * s.channels + c) * bins + b] = pooled[b * s.channels + c];
      }
    }
  });
  return output;
}

// Gradients of input, offset and mask in the dtype of the computation; empty where not needed. Threads share out the
// channels, so each adds to pixels of its own and the order of all sums is fixed.
template <typename T>
std::array<Tensor, 3> backward(const DeformRoiPoolSizes& s, const Tensor& grad, const Tensor& input, const Tensor& rois,
                               const std::optional<Tensor>& offset, const std::optional<Tensor>& mask, bool need_input,
                               bool need_offset) {
  const Operands<T> operands(s, input, rois, offset, mask);
  // (rois, bins, channels): the channels of a bin side by side.
  const Tensor grad_bins = dense(grad, scalar_type_of<T>(), MemoryFormat::ChannelsLast);
  const T* grad_data = grad_bins.template const_data_ptr<T>();
  const int64_t bins = operands.bins();
  const int64_t parts = std::clamp<int64_t>(s.channels / 16, 1, torch::stable::get_num_threads());

  Tensor grad_input = empty_4d(input, {s.batch, s.channels, s.height, s.width}, scalar_type_of<T>(), true);
  torch::stable::zero_(grad_input);
  const std::vector<int64_t> partial{parts, s.rois, bins};
  Tensor by_x = torch::stable::new_zeros(input, partial, scalar_type_of<T>());
  Tensor by_y = torch::stable::new_zeros(input, partial, scalar_type_of<T>());
  Tensor by_mask = torch::stable::new_zeros(input, partial, scalar_type_of<T>());
  T* grad_image_data = grad_input.template mutable_data_ptr<T>();
  T* x_data = by_x.template mutable_data_ptr<T>();
  T* y_data = by_y.template mutable_data_ptr<T>();
  T* mask_data = by_mask.template mutable_data_ptr<T>();

  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    Bin<T> bin;
    for (int64_t part = first; part < last; ++part) {
      const Range channels = part_of(s.channels, parts, part);
      const int64_t count = channels.end - channels.begin;
      for (int64_t r = 0; r < s.rois; ++r) {
        const Roi<T> roi = read_roi(s, operands.rois + 5 * r);
        const int64_t image_begin = operands.image_begin(roi.image) + channels.begin;
        for (int64_t b = 0; b < bins; ++b) {
          bin.set(operands, r, roi, b);
          const T* gradient = grad_data + (r * bins + b) * s.channels + channels.begin;
          T sum_x = 0, sum_y = 0, sum_mask = 0;
          bin.for_each_pixel(s.width, [&](int64_t pixel, const auto& row, const auto& column) {
            const int64_t at = image_begin + pixel * s.channels;
            const T weight = row.weight * column.weight;
            if (need_input) {
              kernels<T>().add_scaled(grad_image_data + at, gradient, weight * bin.average * bin.modulation, count);
            }
            if (need_offset) {
              const T dot = kernels<T>().inner(gradient, operands.images + at, count);
              sum_x += row.weight * column.slope * dot;
              sum_y += row.slope * column.weight * dot;
              sum_mask += weight * dot;
            }
          });
          const int64_t at = (part * s.rois + r) * bins + b;
          x_data[at] = sum_x * bin.shift_x * bin.average * bin.modulation;
          y_data[at] = sum_y * bin.shift_y * bin.average * bin.modulation;
          mask_data[at] = sum_mask * bin.average;
        }
      }
    }
  });

  const Tensor none = empty_result(grad);
  const std::array<int64_t, 1> axis{0};
  Tensor grad_offset = none, grad_mask = none;
  if (need_offset && offset) {
    grad_offset = torch::stable::new_empty(input, offset->sizes(), scalar_type_of<T>());
    const std::vector<int64_t> plane{s.rois, s.out_h, s.out_w};
    int64_t channel = 0;
    for (const Tensor* by : {&by_x, &by_y}) {
      Tensor to = torch::stable::select(grad_offset, 1, channel++);
      torch::stable::copy_(to, torch::stable::reshape(torch::stable::sum(*by, axis), plane));
    }
  }
  if (need_offset && mask) grad_mask = torch::stable::reshape(torch::stable::sum(by_mask, axis), mask->sizes());
  return {need_input ? grad_input : none, grad_offset, grad_mask};
}

Tensor deform_roi_pool(Tensor input, Tensor rois, std::optional<Tensor> offset, std::vector<int64_t> output_size,
                       double spatial_scale, int64_t sampling_ratio, double gamma, std::optional<Tensor> mask) {
  const DeformRoiPoolSizes s =
      check_deform_roi_pool(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  const ScalarType dtype = input.scalar_type();
  const Tensor output = dtype == ScalarType::Double ? forward<double>(s, input, rois, offset, mask)
                                                    : forward<float>(s, input, rois, offset, mask);
  return output.scalar_type() == dtype ? output : torch::stable::to(output, dtype);
}

std::tuple<Tensor, Tensor, Tensor> deform_roi_pool_backward(Tensor grad, Tensor input, Tensor rois,
                                                            std::optional<Tensor> offset, std::optional<Tensor> mask,
                                                            std::vector<int64_t> output_size, double spatial_scale,
                                                            int64_t sampling_ratio, double gamma, bool need_input,
                                                            bool need_offset) {
  const DeformRoiPoolSizes s =
      check_deform_roi_pool(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  check_operand("deform_roi_pool_backward", "grad", grad, input, 4);
  check_shape("deform_roi_pool_backward", "grad", grad, {s.rois, s.channels, s.out_h, s.out_w});
  const ScalarType dtype = input.scalar_type();
  std::array<Tensor, 3> gradients = dtype == ScalarType::Double
                                        ? backward<double>(s, grad, input, rois, offset, mask, need_input, need_offset)
                                        : backward<float>(s, grad, input, rois, offset, mask, need_input, need_offset);
  if (need_input && !is_channels_last(input)) gradients[0] = torch::stable::contiguous(gradients[0]);
  for (Tensor& gradient : gradients) {
    if (gradient.scalar_type() != dtype) gradient = torch::stable::to(gradient, dtype);
  }
  return {gradients[0], gradients[1], gradients[2]};
}

}  // namespace
}  // namespace dcn::cpu

STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CPU, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&dcn::cpu::deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&dcn::cpu::deform_roi_pool_backward));
}
