// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_roi_pool on CPU. The work is in roi_pool.h; here is where a bin samples.
#include "deform_roi_pool.h"

#include "cpu/roi_pool/backward.h"
#include "cpu/roi_pool/forward.h"

namespace dcn::cpu {
namespace {

// Where a bin samples; see deform_roi_pool.h.
template <typename T>
struct Geometry {
  DeformRoiPoolSizes sizes;

  struct Axis {
    RoiAxis<T> axis;
    int32_t size;
    T unit;

    struct Samples {
      const Axis& of;
      int64_t bin;
      T shift;
      SampleRange range;

      AxisSample<T> operator()(int64_t k) const {
        return sample_axis_clamped(roi_sample_position(of.axis, bin, k, shift), of.size);
      }
    };
    Samples samples(int64_t bin, T offset) const {
      const T shift = unit * offset;
      return {*this, bin, shift, roi_sample_range(axis, bin, shift, size)};
    }
  };
  struct Axes {
    Axis y, x;
    T share;

    T average(int64_t, int64_t) const { return share; }  // samples off the map count as zeros
  };

  Axes axes(const T* row) const {
    const Roi<T> roi = read_roi(sizes, row);
    const T gamma = static_cast<T>(sizes.gamma);
    return {{roi.y, static_cast<int32_t>(sizes.height), gamma * roi.y.size},
            {roi.x, static_cast<int32_t>(sizes.width), gamma * roi.x.size},
            T(1) / roi.count()};
  }
  int64_t cell(int64_t, int64_t) const { return 0; }
  int64_t part(int64_t h, int64_t w) const { return h * sizes.out_w + w; }
};

Tensor deform_roi_pool(Tensor input, Tensor rois, std::optional<Tensor> offset, std::vector<int64_t> output_size,
                       double spatial_scale, int64_t sampling_ratio, double gamma, std::optional<Tensor> mask) {
  const auto s = check_deform_roi_pool(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  return roi_pool<Geometry>("deform_roi_pool", s, input, rois, offset, mask);
}

std::tuple<Tensor, Tensor, Tensor> deform_roi_pool_backward(Tensor grad, Tensor input, Tensor rois,
                                                            std::optional<Tensor> offset, std::optional<Tensor> mask,
                                                            std::vector<int64_t> output_size, double spatial_scale,
                                                            int64_t sampling_ratio, double gamma, bool need_input,
                                                            bool need_offset, bool /*deterministic*/) {
  const auto s = check_deform_roi_pool(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  return roi_pool_gradients<Geometry>("deform_roi_pool", s, grad, input, rois, offset, mask, need_input, need_offset);
}

}  // namespace
}  // namespace dcn::cpu

STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CPU, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&dcn::cpu::deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&dcn::cpu::deform_roi_pool_backward));
}
