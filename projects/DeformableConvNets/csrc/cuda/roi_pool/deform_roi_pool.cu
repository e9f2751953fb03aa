// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_roi_pool on CUDA. The work is in roi_pool.cuh; here is where a bin samples.
#include "cuda/roi_pool/entry.cuh"
#include "deform_roi_pool.h"

namespace dcn::cuda {
namespace {

// See deform_roi_pool.h for the geometry.
template <typename A>
struct DeformRoiPoolBins {
  DeformRoiPoolSizes sizes;

  struct Axis {
    RoiAxis<A> axis;
    int64_t bin, begin, end;
    int32_t size;
    A shift, average, unit;

    __device__ __forceinline__ AxisSample<A> sample(int64_t k) const {
      return sample_axis_clamped(roi_sample_position(axis, bin, k, shift), size);
    }
  };

  __device__ __forceinline__ int64_t part(int64_t h, int64_t w) const { return h * sizes.out_w + w; }
  bool own_parts() const { return true; }
  __device__ __forceinline__ int64_t cell(int64_t, int64_t) const { return 0; }

  __device__ __forceinline__ Axis axis(const A* row, bool column, int64_t bin, A offset) const {
    const Roi<A> roi = read_roi(sizes, row);
    Axis found;
    found.axis = column ? roi.x : roi.y;
    found.bin = bin;
    found.size = static_cast<int32_t>(column ? sizes.width : sizes.height);
    found.unit = static_cast<A>(sizes.gamma) * found.axis.size;
    found.shift = found.unit * offset;
    found.average = found.axis.grid > 0 ? A(1) / static_cast<A>(found.axis.grid) : A(1);
    const SampleRange range = roi_sample_range(found.axis, bin, found.shift, found.size);
    found.begin = range.begin, found.end = range.end;
    return found;
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
                                                            bool need_offset, bool deterministic) {
  const auto s = check_deform_roi_pool(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  check_operand("deform_roi_pool_backward", "grad", grad, input, 4);
  check_shape("deform_roi_pool_backward", "grad", grad, {s.rois, s.channels, s.out_h, s.out_w});
  return dispatch(input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const DeformRoiPoolBins<Accumulate<T>> bins{s};
    return roi_pool_backward<T, DeformRoiPoolBins>(sizes_of(s), bins, grad, input, rois, offset, mask, need_input,
                                                   need_offset, deterministic);
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
