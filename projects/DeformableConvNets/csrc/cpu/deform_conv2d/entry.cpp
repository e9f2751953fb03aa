// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Where deform_conv2d and modulated_deform_conv2d enter on CPU. A call takes one of three paths: bfloat16.h, grouped.h,
// or dense.h for the rest. float16, and bfloat16 where its path cannot be taken, are computed in float32.
#include "cpu/deform_conv2d/bfloat16.h"
#include "cpu/deform_conv2d/dense.h"
#include "cpu/deform_conv2d/grouped.h"

namespace dcn::cpu {
namespace {

template <typename T>
Tensor forward(const DeformConv2dSizes& s, const Tensor& input, const SamplingInputs& sampling, const Tensor& weight,
               const std::optional<Tensor>& bias) {
  return (uses_grouped_path<T>(s) ? grouped_forward<T> : dense_forward<T>)(s, input, sampling, weight, bias);
}

template <typename T>
std::array<Tensor, 4> backward(const DeformConv2dSizes& s, const Tensor& grad, const Tensor& input,
                               const SamplingInputs& sampling, const Tensor& weight, const NeededGradients& need) {
  return (uses_grouped_path<T>(s) ? grouped_backward<T> : dense_backward<T>)(s, grad, input, sampling, weight, need);
}

Tensor forward_in_dtype(const DeformConv2dSizes& s, const Tensor& input, const SamplingInputs& sampling,
                        const Tensor& weight, const std::optional<Tensor>& bias) {
  const ScalarType dtype = input.scalar_type();
  if (uses_bfloat16_path(s, dtype)) return bfloat16_forward(s, input, sampling, weight, bias);
  const Tensor output = dtype == ScalarType::Double ? forward<double>(s, input, sampling, weight, bias)
                                                    : forward<float>(s, input, sampling, weight, bias);
  return as_result(output, dtype, is_channels_last(input));
}

std::array<Tensor, 4> backward_in_dtype(const char* op, const DeformConv2dSizes& s, const Tensor& grad,
                                        const Tensor& input, const SamplingInputs& sampling, const Tensor& weight,
                                        const NeededGradients& need) {
  check_operand(op, "grad", grad, input, 4);
  check_shape(op, "grad", grad, {s.batch, s.out_channels, s.out_h, s.out_w});
  const ScalarType dtype = input.scalar_type();
  std::array<Tensor, 4> gradients =
      uses_bfloat16_path(s, dtype)  ? bfloat16_backward(s, grad, input, sampling, weight, need)
      : dtype == ScalarType::Double ? backward<double>(s, grad, input, sampling, weight, need)
                                    : backward<float>(s, grad, input, sampling, weight, need);
  if (need.input) gradients[0] = as_result(gradients[0], dtype, is_channels_last(input));
  if (need.offset) {
    const Tensor& offset = sampling.branch_output ? *sampling.branch_output : sampling.offset;
    gradients[1] = as_result(gradients[1], offset.scalar_type(), sampling.branch_output && is_channels_last(offset));
    if (has_own_mask(sampling)) gradients[3] = as_result(gradients[3], sampling.mask->scalar_type(), false);
  }
  if (need.weight) gradients[2] = as_result(gradients[2], dtype, is_channels_last(weight));
  for (Tensor& gradient : gradients) {
    if (gradient.dim() == 1) gradient = empty_result(input);  // one that is not needed
  }
  return gradients;
}

Tensor deform_conv2d(Tensor input, Tensor offset, Tensor weight, std::optional<Tensor> bias,
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                     std::optional<Tensor> mask) {
  const SamplingInputs sampling{offset, mask, std::nullopt};
  const DeformConv2dSizes s = check_deform_conv2d(input, sampling, weight, bias, stride, padding, dilation, true);
  return forward_in_dtype(s, input, sampling, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward(
    Tensor grad, Tensor input, Tensor offset, Tensor weight, std::optional<Tensor> mask, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, bool need_input, bool need_offset, bool need_weight) {
  const SamplingInputs sampling{offset, mask, std::nullopt};
  const DeformConv2dSizes s =
      check_deform_conv2d(input, sampling, weight, std::nullopt, stride, padding, dilation, true);
  const auto gradients = backward_in_dtype("deform_conv2d_backward", s, grad, input, sampling, weight,
                                           {need_input, need_offset, need_weight});
  return {gradients[0], gradients[1], gradients[2], gradients[3]};
}

Tensor modulated_deform_conv2d(Tensor input, Tensor offset_and_mask, Tensor weight, std::optional<Tensor> bias,
                               std::vector<int64_t> stride, std::vector<int64_t> padding,
                               std::vector<int64_t> dilation) {
  const SamplingInputs sampling = split_branch_output(offset_and_mask, weight);
  const DeformConv2dSizes s = check_deform_conv2d(input, sampling, weight, bias, stride, padding, dilation, true);
  return forward_in_dtype(s, input, sampling, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor> modulated_deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset_and_mask,
                                                                    Tensor weight, std::vector<int64_t> stride,
                                                                    std::vector<int64_t> padding,
                                                                    std::vector<int64_t> dilation, bool need_input,
                                                                    bool need_offset, bool need_weight) {
  const SamplingInputs sampling = split_branch_output(offset_and_mask, weight);
  const DeformConv2dSizes s =
      check_deform_conv2d(input, sampling, weight, std::nullopt, stride, padding, dilation, true);
  const auto gradients = backward_in_dtype("modulated_deform_conv2d_backward", s, grad, input, sampling, weight,
                                           {need_input, need_offset, need_weight});
  return {gradients[0], gradients[1], gradients[2]};
}

}  // namespace
}  // namespace dcn::cpu

STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&dcn::cpu::deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_BOX(&dcn::cpu::deform_conv2d_backward));
  m.impl("modulated_deform_conv2d", TORCH_BOX(&dcn::cpu::modulated_deform_conv2d));
  m.impl("modulated_deform_conv2d_backward", TORCH_BOX(&dcn::cpu::modulated_deform_conv2d_backward));
}
