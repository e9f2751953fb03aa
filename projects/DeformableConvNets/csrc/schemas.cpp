// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The schemas of all operators. As they are here, exported models run where only this library has been loaded, without
// Python. dcn_d2/ops has the same texts, for where there is no library, and compares them when it is imported.
#include "tensor.h"

namespace dcn {
namespace {

#if !defined(USE_CUDA)
// cuda/architectures.cu has this for builds with CUDA kernels.
std::string cuda_architectures() { return ""; }
#endif

// torch's own default. dcn_d2/ops puts a function that reads torch's setting before it.
bool allows_tf32() { return true; }

}  // namespace
}  // namespace dcn

// A fragment: where something else has defined the operators, torch says so and stops the process. A whole library
// would be a crash without a word.
STABLE_TORCH_LIBRARY_FRAGMENT(dcn_d2, m) {
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias=None, int[2] stride=1, "
      "int[2] padding=0, int[2] dilation=1, Tensor? mask=None) -> Tensor");
  m.def(
      "deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset, Tensor weight, Tensor? mask, int[2] stride, "
      "int[2] padding, int[2] dilation, bool need_input, bool need_offset, bool need_weight) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "modulated_deform_conv2d(Tensor input, Tensor offset_and_mask, Tensor weight, Tensor? bias=None, "
      "int[2] stride=1, int[2] padding=0, int[2] dilation=1) -> Tensor");
  m.def(
      "modulated_deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset_and_mask, Tensor weight, "
      "int[2] stride, int[2] padding, int[2] dilation, bool need_input, bool need_offset, bool need_weight) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "deform_roi_pool(Tensor input, Tensor rois, Tensor? offset, int[2] output_size, float spatial_scale=1.0, "
      "int sampling_ratio=0, float gamma=0.1, Tensor? mask=None) -> Tensor");
  m.def(
      "deform_roi_pool_backward(Tensor grad, Tensor input, Tensor rois, Tensor? offset, Tensor? mask, "
      "int[2] output_size, float spatial_scale, int sampling_ratio, float gamma, bool need_input, bool need_offset, "
      "bool deterministic) -> (Tensor, Tensor, Tensor)");
  m.def(
      "deform_psroi_pool(Tensor input, Tensor rois, Tensor? offset, int[2] output_size, float spatial_scale=1.0, "
      "int group_size=1, int[2]? part_size=None, int sample_per_part=4, float trans_std=0.1, Tensor? mask=None) "
      "-> Tensor");
  m.def(
      "deform_psroi_pool_backward(Tensor grad, Tensor input, Tensor rois, Tensor? offset, Tensor? mask, "
      "int[2] output_size, float spatial_scale, int group_size, int[2]? part_size, int sample_per_part, "
      "float trans_std, bool need_input, bool need_offset, bool deterministic) -> (Tensor, Tensor, Tensor)");
  m.def("batched_nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor");
  m.def("capability() -> str");
  m.def("cuda_architectures() -> str");
  m.def("_allows_tf32() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CompositeExplicitAutograd, m) {
#if !defined(USE_CUDA)
  m.impl("cuda_architectures", TORCH_BOX(&dcn::cuda_architectures));
#endif
  m.impl("_allows_tf32", TORCH_BOX(&dcn::allows_tf32));
}
