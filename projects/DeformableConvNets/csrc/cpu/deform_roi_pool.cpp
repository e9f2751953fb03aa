// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_roi_pool on CPU. The work is in roi_pool.h; here is where a bin samples.
#include "deform_roi_pool.h"

#include "roi_pool.h"

namespace dcn::cpu {
namespace {

// Finds the samples of a bin; see deform_roi_pool.h for the geometry.
template <typename T>
struct Locate {
  DeformRoiPoolSizes sizes;

  void operator()(Bin<T>& bin, const RoiPoolOperands<T>& operands, int64_t r, int64_t block, int64_t h,
                  int64_t w) const {
    const Roi<T> roi = read_roi(sizes, operands.rois + 5 * r);
    bin.cell = 0;
    bin.part = h * sizes.out_w + w;
    bin.unit_y = static_cast<T>(sizes.gamma) * roi.y.size;
    bin.unit_x = static_cast<T>(sizes.gamma) * roi.x.size;
    bin.average = T(1) / roi.count();
    add_samples(bin.rows, roi.y, h, bin.unit_y * operands.offset_y(r, block, bin.part), sizes.height);
    add_samples(bin.columns, roi.x, w, bin.unit_x * operands.offset_x(r, block, bin.part), sizes.width);
  }

  static void add_samples(AxisSum<T>& sum, const RoiAxis<T>& axis, int64_t bin, T shift, int64_t size) {
    sum.clear();
    const auto length = static_cast<int32_t>(size);
    const SampleRange range = roi_sample_range(axis, bin, shift, length);
    for (int64_t k = range.begin; k < range.end; ++k) {
      sum.add(sample_axis_clamped(roi_sample_position(axis, bin, k, shift), length));
    }
  }
};

Tensor deform_roi_pool(Tensor input, Tensor rois, std::optional<Tensor> offset, std::vector<int64_t> output_size,
                       double spatial_scale, int64_t sampling_ratio, double gamma, std::optional<Tensor> mask) {
  const auto s = check_deform_roi_pool(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  return roi_pool<Locate>("deform_roi_pool", s, input, rois, offset, mask);
}

std::tuple<Tensor, Tensor, Tensor> deform_roi_pool_backward(Tensor grad, Tensor input, Tensor rois,
                                                            std::optional<Tensor> offset, std::optional<Tensor> mask,
                                                            std::vector<int64_t> output_size, double spatial_scale,
                                                            int64_t sampling_ratio, double gamma, bool need_input,
                                                            bool need_offset, bool /*deterministic*/) {
  const auto s = check_deform_roi_pool(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  return roi_pool_gradients<Locate>("deform_roi_pool", s, grad, input, rois, offset, mask, need_input, need_offset);
}

}  // namespace
}  // namespace dcn::cpu

STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CPU, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&dcn::cpu::deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&dcn::cpu::deform_roi_pool_backward));
}
