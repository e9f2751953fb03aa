// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_psroi_pool on CPU. The work is in roi_pool.h; here is where a bin samples.
#include "deform_psroi_pool.h"

#include "cpu/roi_pool/backward.h"
#include "cpu/roi_pool/forward.h"

namespace dcn::cpu {
namespace {

// Where a bin samples; see deform_psroi_pool.h.
template <typename T>
struct Geometry {
  DeformPsRoiPoolSizes sizes;

  struct Axis {
    PsRoiAxis<T> axis;
    int32_t size;
    int64_t count;
    T trans_std, unit;

    struct Samples {
      const Axis& of;
      int64_t bin;
      T offset;
      SampleRange range;

      AxisSample<T> operator()(int64_t k) const {
        return sample_axis_half_pixel(psroi_sample_position(of.axis, bin, k, offset, of.trans_std), of.size);
      }
    };
    Samples samples(int64_t bin, T offset) const { return {*this, bin, offset, {0, count}}; }
  };
  struct Axes {
    Axis y, x;

    // Samples off the map do not count.
    T average(int64_t rows, int64_t columns) const {
      const int64_t count = rows * columns;
      return count > 0 ? T(1) / T(count) : T(0);
    }
  };

  Axes axes(const T* row) const {
    const T scale = static_cast<T>(sizes.spatial_scale), trans_std = static_cast<T>(sizes.trans_std);
    const PsRoiAxis<T> y = psroi_axis(row[2], row[4], scale, sizes.out_h, sizes.samples);
    const PsRoiAxis<T> x = psroi_axis(row[1], row[3], scale, sizes.out_w, sizes.samples);
    return {{y, static_cast<int32_t>(sizes.height), sizes.samples, trans_std, trans_std * y.size},
            {x, static_cast<int32_t>(sizes.width), sizes.samples, trans_std, trans_std * x.size}};
  }
  int64_t cell(int64_t h, int64_t w) const { return sizes.cell(h, w); }
  int64_t part(int64_t h, int64_t w) const { return sizes.part(h, w); }
};

Tensor deform_psroi_pool(Tensor input, Tensor rois, std::optional<Tensor> offset, std::vector<int64_t> output_size,
                         double spatial_scale, int64_t group_size, std::optional<std::vector<int64_t>> part_size,
                         int64_t sample_per_part, double trans_std, std::optional<Tensor> mask) {
  const auto s = check_deform_psroi_pool(input, rois, offset, mask, output_size, spatial_scale, group_size, part_size,
                                         sample_per_part, trans_std);
  return roi_pool<Geometry>("deform_psroi_pool", s, input, rois, offset, mask);
}

std::tuple<Tensor, Tensor, Tensor> deform_psroi_pool_backward(
    Tensor grad, Tensor input, Tensor rois, std::optional<Tensor> offset, std::optional<Tensor> mask,
    std::vector<int64_t> output_size, double spatial_scale, int64_t group_size,
    std::optional<std::vector<int64_t>> part_size, int64_t sample_per_part, double trans_std, bool need_input,
    bool need_offset, bool /*deterministic*/) {
  const auto s = check_deform_psroi_pool(input, rois, offset, mask, output_size, spatial_scale, group_size, part_size,
                                         sample_per_part, trans_std);
  return roi_pool_gradients<Geometry>("deform_psroi_pool", s, grad, input, rois, offset, mask, need_input, need_offset);
}

}  // namespace
}  // namespace dcn::cpu

STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CPU, m) {
  m.impl("deform_psroi_pool", TORCH_BOX(&dcn::cpu::deform_psroi_pool));
  m.impl("deform_psroi_pool_backward", TORCH_BOX(&dcn::cpu::deform_psroi_pool_backward));
}
