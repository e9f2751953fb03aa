// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_roi_pool on CUDA. The work is in roi_pool.cuh; here is where a bin samples.
#include "deform_roi_pool.h"
#include "roi_pool.cuh"

namespace dcn::cuda {
namespace {

// See deform_roi_pool.h for the geometry.
template <typename A>
struct DeformRoiPoolBins {
  DeformRoiPoolSizes sizes;

  struct Bin {
    Roi<A> roi;
    int64_t h, w;
    int32_t height, width;
    A unit_y, unit_x, average, shift_y, shift_x;
    SampleRange rows, columns;
    int64_t cell;

    __device__ __forceinline__ AxisSample<A> row(int64_t k) const {
      return sample_axis_clamped(roi_sample_position(roi.y, h, k, shift_y), height);
    }
    __device__ __forceinline__ AxisSample<A> column(int64_t k) const {
      return sample_axis_clamped(roi_sample_position(roi.x, w, k, shift_x), width);
    }
  };

  __device__ __forceinline__ int64_t part(int64_t h, int64_t w) const { return h * sizes.out_w + w; }

  __device__ __forceinline__ Bin bin(const A* row, int64_t h, int64_t w, A offset_y, A offset_x) const {
    Bin bin;
    bin.roi = read_roi(sizes, row);
    bin.h = h, bin.w = w, bin.cell = 0;
    bin.height = static_cast<int32_t>(sizes.height), bin.width = static_cast<int32_t>(sizes.width);
    bin.unit_y = static_cast<A>(sizes.gamma) * bin.roi.y.size;
    bin.unit_x = static_cast<A>(sizes.gamma) * bin.roi.x.size;
    bin.average = A(1) / bin.roi.count();
    bin.shift_y = bin.unit_y * offset_y, bin.shift_x = bin.unit_x * offset_x;
    bin.rows = roi_sample_range(bin.roi.y, h, bin.shift_y, bin.height);
    bin.columns = roi_sample_range(bin.roi.x, w, bin.shift_x, bin.width);
    return bin;
  }
};

Tensor deform_roi_pool(Tensor input, Tensor rois, std::optional<Tensor> offset, std::vector<int64_t> output_size,
                       double spatial_scale, int64_t sampling_ratio, double gamma, std::optional<Tensor> mask) {
  const auto s = check_deform_roi_pool(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  return dispatch(input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const DeformRoiPoolBins<Accumulate<T>> bins{s};
    return roi_pool_forward<T, DeformRoiPoolBins>(sizes_of(s), bins, input, rois, offset, mask);
  });
}

std::tuple<Tensor, Tensor, Tensor> deform_roi_pool_backward(Tensor grad, Tensor input, Tensor rois,
                                                            std::optional<Tensor> offset, std::optional<Tensor> mask,
                                                            std::vector<int64_t> output_size, double spatial_scale,
                                                            int64_t sampling_ratio, double gamma, bool need_input,
                                                            bool need_offset) {
  const auto s = check_deform_roi_pool(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  check_operand("deform_roi_pool_backward", "grad", grad, input, 4);
  check_shape("deform_roi_pool_backward", "grad", grad, {s.rois, s.channels, s.out_h, s.out_w});
  return dispatch(input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const DeformRoiPoolBins<Accumulate<T>> bins{s};
    return roi_pool_backward<T, DeformRoiPoolBins>(sizes_of(s), bins, grad, input, rois, offset, mask, need_input,
                                                   need_offset);
  });
}

}  // namespace
}  // namespace dcn::cuda

#if !defined(DCN_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CUDA, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&dcn::cuda::deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&dcn::cuda::deform_roi_pool_backward));
}
#endif
