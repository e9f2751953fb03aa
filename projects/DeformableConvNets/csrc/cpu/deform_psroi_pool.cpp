// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_psroi_pool on CPU. The work is in roi_pool.h; here is where a bin samples.
#include "deform_psroi_pool.h"

#include "roi_pool.h"

namespace dcn::cpu {
namespace {

// Finds the samples of a bin; see deform_psroi_pool.h for the geometry.
template <typename T>
struct Locate {
  DeformPsRoiPoolSizes sizes;

  void operator()(Bin<T>& bin, const RoiPoolOperands<T>& operands, int64_t r, int64_t block, int64_t h,
                  int64_t w) const {
    const T* row = operands.rois + 5 * r;
    const T scale = static_cast<T>(sizes.spatial_scale), trans_std = static_cast<T>(sizes.trans_std);
    const PsRoiAxis<T> y = psroi_axis(row[2], row[4], scale, sizes.out_h, sizes.samples);
    const PsRoiAxis<T> x = psroi_axis(row[1], row[3], scale, sizes.out_w, sizes.samples);
    bin.cell = sizes.cell(h, w);
    bin.part = sizes.part(h, w);
    const T offset_y = operands.offset_y(r, block, bin.part), offset_x = operands.offset_x(r, block, bin.part);
    bin.rows.clear();
    bin.columns.clear();
    for (int64_t k = 0; k < sizes.samples; ++k) {
      bin.rows.add(sample_axis_half_pixel(psroi_sample_position(y, h, k, offset_y, trans_std),
                                          static_cast<int32_t>(sizes.height)));
      bin.columns.add(sample_axis_half_pixel(psroi_sample_position(x, w, k, offset_x, trans_std),
                                             static_cast<int32_t>(sizes.width)));
    }
    // Samples off the map do not count. A RoI that is not finite has none on it, and no shift to differentiate by.
    const int64_t count = bin.rows.samples() * bin.columns.samples();
    bin.average = count ? T(1) / T(count) : T(0);
    bin.unit_y = count ? trans_std * y.size : T(0);
    bin.unit_x = count ? trans_std * x.size : T(0);
  }
};

Tensor deform_psroi_pool(Tensor input, Tensor rois, std::optional<Tensor> offset, std::vector<int64_t> output_size,
                         double spatial_scale, int64_t group_size, std::optional<std::vector<int64_t>> part_size,
                         int64_t sample_per_part, double trans_std, std::optional<Tensor> mask) {
  const auto s = check_deform_psroi_pool(input, rois, offset, mask, output_size, spatial_scale, group_size, part_size,
                                         sample_per_part, trans_std);
  return roi_pool<Locate>("deform_psroi_pool", s, input, rois, offset, mask);
}

std::tuple<Tensor, Tensor, Tensor> deform_psroi_pool_backward(
    Tensor grad, Tensor input, Tensor rois, std::optional<Tensor> offset, std::optional<Tensor> mask,
    std::vector<int64_t> output_size, double spatial_scale, int64_t group_size,
    std::optional<std::vector<int64_t>> part_size, int64_t sample_per_part, double trans_std, bool need_input,
    bool need_offset, bool /*deterministic*/) {
  const auto s = check_deform_psroi_pool(input, rois, offset, mask, output_size, spatial_scale, group_size, part_size,
                                         sample_per_part, trans_std);
  return roi_pool_gradients<Locate>("deform_psroi_pool", s, grad, input, rois, offset, mask, need_input, need_offset);
}

}  // namespace
}  // namespace dcn::cpu

STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CPU, m) {
  m.impl("deform_psroi_pool", TORCH_BOX(&dcn::cpu::deform_psroi_pool));
  m.impl("deform_psroi_pool_backward", TORCH_BOX(&dcn::cpu::deform_psroi_pool_backward));
}
