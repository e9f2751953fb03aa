// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_psroi_pool on CUDA: the entry points. Where a bin samples is in deform_psroi_pool.h, the work in the headers
// of this folder.
#include "cuda/roi_pool/entry.cuh"
#include "deform_psroi_pool.h"

namespace dcn::cuda {
namespace {

Tensor deform_psroi_pool(Tensor input, Tensor rois, std::optional<Tensor> offset, std::vector<int64_t> output_size,
                         double spatial_scale, int64_t group_size, std::optional<std::vector<int64_t>> part_size,
                         int64_t sample_per_part, double trans_std, std::optional<Tensor> mask) {
  const RoiPoolInputs given{input, rois, offset, mask};
  const auto s =
      check_deform_psroi_pool(given, output_size, spatial_scale, group_size, part_size, sample_per_part, trans_std);
  return roi_pool<DeformPsRoiPoolGeometry>(s, given);
}

std::tuple<Tensor, Tensor, Tensor> deform_psroi_pool_backward(Tensor grad, Tensor input, Tensor rois,
                                                              std::optional<Tensor> offset, std::optional<Tensor> mask,
                                                              std::vector<int64_t> output_size, double spatial_scale,
                                                              int64_t group_size,
                                                              std::optional<std::vector<int64_t>> part_size,
                                                              int64_t sample_per_part, double trans_std,
                                                              bool need_input, bool need_offset, bool deterministic) {
  const RoiPoolInputs given{input, rois, offset, mask};
  const auto s =
      check_deform_psroi_pool(given, output_size, spatial_scale, group_size, part_size, sample_per_part, trans_std);
  return roi_pool_gradients<DeformPsRoiPoolGeometry>("deform_psroi_pool_backward", s, grad, given,
                                                     {need_input, need_offset}, deterministic);
}

}  // namespace
}  // namespace dcn::cuda

#if !defined(DCN_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CUDA, m) {
  m.impl("deform_psroi_pool", TORCH_BOX(&dcn::cuda::deform_psroi_pool));
  m.impl("deform_psroi_pool_backward", TORCH_BOX(&dcn::cuda::deform_psroi_pool_backward));
}
#endif
