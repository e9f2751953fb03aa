// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_roi_pool on CUDA: the entry points. Where a bin samples is in deform_roi_pool.h, the work in the headers of
// this folder.
#include "cuda/roi_pool/entry.cuh"
#include "deform_roi_pool.h"

namespace dcn::cuda {
namespace {

Tensor deform_roi_pool(Tensor input, Tensor rois, std::optional<Tensor> offset, std::vector<int64_t> output_size,
                       double spatial_scale, int64_t sampling_ratio, double gamma, std::optional<Tensor> mask) {
  const RoiPoolInputs given{input, rois, offset, mask};
  const auto s = check_deform_roi_pool(given, output_size, spatial_scale, sampling_ratio, gamma);
  return roi_pool<DeformRoiPoolGeometry>(s, given);
}

std::tuple<Tensor, Tensor, Tensor> deform_roi_pool_backward(Tensor grad, Tensor input, Tensor rois,
                                                            std::optional<Tensor> offset, std::optional<Tensor> mask,
                                                            std::vector<int64_t> output_size, double spatial_scale,
                                                            int64_t sampling_ratio, double gamma, bool need_input,
                                                            bool need_offset, bool deterministic) {
  const RoiPoolInputs given{input, rois, offset, mask};
  const auto s = check_deform_roi_pool(given, output_size, spatial_scale, sampling_ratio, gamma);
  return roi_pool_gradients<DeformRoiPoolGeometry>("deform_roi_pool_backward", s, grad, given,
                                                   {need_input, need_offset}, deterministic);
}

}  // namespace
}  // namespace dcn::cuda

#if !defined(DCN_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CUDA, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&dcn::cuda::deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&dcn::cuda::deform_roi_pool_backward));
}
#endif
