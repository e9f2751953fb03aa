// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_psroi_pool on CUDA. The work is in roi_pool.cuh; here is where a bin samples.
#include "cuda/roi_pool/entry.cuh"
#include "deform_psroi_pool.h"

namespace dcn::cuda {
namespace {

// See deform_psroi_pool.h for the geometry.
template <typename A>
struct DeformPsRoiPoolBins {
  DeformPsRoiPoolSizes sizes;

  struct Axis {
    PsRoiAxis<A> axis;
    int64_t bin, begin, end;
    int32_t size;
    A offset, trans_std, average, unit;

    __device__ __forceinline__ AxisSample<A> sample(int64_t k) const {
      return sample_axis_half_pixel(psroi_sample_position(axis, bin, k, offset, trans_std), size);
    }
  };

  __device__ __forceinline__ int64_t part(int64_t h, int64_t w) const { return sizes.part(h, w); }
  bool own_parts() const { return sizes.part_h == sizes.out_h && sizes.part_w == sizes.out_w; }
  __device__ __forceinline__ int64_t cell(int64_t h, int64_t w) const { return sizes.cell(h, w); }

  __device__ __forceinline__ Axis axis(const A* row, bool column, int64_t bin, A offset) const {
    const A scale = static_cast<A>(sizes.spatial_scale);
    Axis found;
    found.axis = column ? psroi_axis(row[1], row[3], scale, sizes.out_w, sizes.samples)
                        : psroi_axis(row[2], row[4], scale, sizes.out_h, sizes.samples);
    found.bin = bin, found.begin = 0, found.end = sizes.samples;
    found.size = static_cast<int32_t>(column ? sizes.width : sizes.height);
    found.offset = offset, found.trans_std = static_cast<A>(sizes.trans_std);
    // Samples off the map do not count. A RoI that is not finite has none on it, and no shift to differentiate by.
    int64_t count = 0;
#pragma unroll 1
    for (int64_t k = 0; k < sizes.samples; ++k) count += found.sample(k).exists[0];  // the lower neighbour exists
    found.average = count > 0 ? A(1) / static_cast<A>(count) : A(0);
    found.unit = count > 0 ? found.trans_std * found.axis.size : A(0);
    return found;
  }
};

Tensor deform_psroi_pool(Tensor input, Tensor rois, std::optional<Tensor> offset, std::vector<int64_t> output_size,
                         double spatial_scale, int64_t group_size, std::optional<std::vector<int64_t>> part_size,
                         int64_t sample_per_part, double trans_std, std::optional<Tensor> mask) {
  const auto s = check_deform_psroi_pool(input, rois, offset, mask, output_size, spatial_scale, group_size, part_size,
                                         sample_per_part, trans_std);
  return dispatch(input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const DeformPsRoiPoolBins<Accumulate<T>> bins{s};
    return roi_pool_forward<T, DeformPsRoiPoolBins>(sizes_of(s), bins, input, rois, offset, mask);
  });
}

std::tuple<Tensor, Tensor, Tensor> deform_psroi_pool_backward(Tensor grad, Tensor input, Tensor rois,
                                                              std::optional<Tensor> offset, std::optional<Tensor> mask,
                                                              std::vector<int64_t> output_size, double spatial_scale,
                                                              int64_t group_size,
                                                              std::optional<std::vector<int64_t>> part_size,
                                                              int64_t sample_per_part, double trans_std,
                                                              bool need_input, bool need_offset, bool deterministic) {
  const auto s = check_deform_psroi_pool(input, rois, offset, mask, output_size, spatial_scale, group_size, part_size,
                                         sample_per_part, trans_std);
  check_operand("deform_psroi_pool_backward", "grad", grad, input, 4);
  check_shape("deform_psroi_pool_backward", "grad", grad, {s.rois, s.out_channels, s.out_h, s.out_w});
  return dispatch(input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const DeformPsRoiPoolBins<Accumulate<T>> bins{s};
    return roi_pool_backward<T, DeformPsRoiPoolBins>(sizes_of(s), bins, grad, input, rois, offset, mask, need_input,
                                                     need_offset, deterministic);
  });
}

}  // namespace
}  // namespace dcn::cuda

#if !defined(DCN_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CUDA, m) {
  m.impl("deform_psroi_pool", TORCH_BOX(&dcn::cuda::deform_psroi_pool));
  m.impl("deform_psroi_pool_backward", TORCH_BOX(&dcn::cuda::deform_psroi_pool_backward));
}
#endif
