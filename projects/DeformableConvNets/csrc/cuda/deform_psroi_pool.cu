// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_psroi_pool on CUDA. The work is in roi_pool.cuh; here is where a bin samples.
#include "deform_psroi_pool.h"
#include "roi_pool.cuh"

namespace dcn::cuda {
namespace {

// See deform_psroi_pool.h for the geometry.
template <typename A>
struct DeformPsRoiPoolBins {
  DeformPsRoiPoolSizes sizes;

  struct Bin {
    PsRoiAxis<A> y, x;
    int64_t h, w;
    int32_t height, width;
    A offset_y, offset_x, trans_std;
    A unit_y, unit_x, average;
    SampleRange rows, columns;
    int64_t cell;

    __device__ __forceinline__ AxisSample<A> row(int64_t k) const {
      return sample_axis_half_pixel(psroi_sample_position(y, h, k, offset_y, trans_std), height);
    }
    __device__ __forceinline__ AxisSample<A> column(int64_t k) const {
      return sample_axis_half_pixel(psroi_sample_position(x, w, k, offset_x, trans_std), width);
    }
  };

  __device__ __forceinline__ int64_t part(int64_t h, int64_t w) const { return sizes.part(h, w); }

  __device__ __forceinline__ Bin bin(const A* row, int64_t h, int64_t w, A offset_y, A offset_x) const {
    Bin bin;
    const A scale = static_cast<A>(sizes.spatial_scale);
    bin.y = psroi_axis(row[2], row[4], scale, sizes.out_h, sizes.samples);
    bin.x = psroi_axis(row[1], row[3], scale, sizes.out_w, sizes.samples);
    bin.h = h, bin.w = w, bin.cell = sizes.cell(h, w);
    bin.height = static_cast<int32_t>(sizes.height), bin.width = static_cast<int32_t>(sizes.width);
    bin.offset_y = offset_y, bin.offset_x = offset_x, bin.trans_std = static_cast<A>(sizes.trans_std);
    bin.rows = bin.columns = {0, sizes.samples};
    // Samples off the map do not count. A RoI that is not finite has none on it, and no shift to differentiate by.
    int64_t rows = 0, columns = 0;
    for (int64_t k = 0; k < sizes.samples; ++k) {
      rows += bin.row(k).exists[0];  // a sample on the map has a lower neighbour
      columns += bin.column(k).exists[0];
    }
    const bool empty = rows == 0 || columns == 0;
    bin.average = empty ? A(0) : A(1) / (static_cast<A>(rows) * static_cast<A>(columns));
    bin.unit_y = empty ? A(0) : bin.trans_std * bin.y.size;
    bin.unit_x = empty ? A(0) : bin.trans_std * bin.x.size;
    return bin;
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
                                                              bool need_input, bool need_offset) {
  const auto s = check_deform_psroi_pool(input, rois, offset, mask, output_size, spatial_scale, group_size, part_size,
                                         sample_per_part, trans_std);
  check_operand("deform_psroi_pool_backward", "grad", grad, input, 4);
  check_shape("deform_psroi_pool_backward", "grad", grad, {s.rois, s.out_channels, s.out_h, s.out_w});
  return dispatch(input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const DeformPsRoiPoolBins<Accumulate<T>> bins{s};
    return roi_pool_backward<T, DeformPsRoiPoolBins>(sizes_of(s), bins, grad, input, rois, offset, mask, need_input,
                                                     need_offset);
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
