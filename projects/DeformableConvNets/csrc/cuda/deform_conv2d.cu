// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_conv2d on CUDA: entry points.
#include <numeric>

#include "deform_conv2d.cuh"

namespace dcn::cuda {
namespace {

// Keeps the dense tensors alive that the kernels read.
template <typename T>
struct DenseOperands {
  Tensor input, offset, weight;
  std::optional<Tensor> mask;
  Operands<T> pointers;

  DenseOperands(const DeformConv2dSizes& s, const Tensor& given_input, const Tensor& given_offset,
                const Tensor& given_weight, const std::optional<Tensor>& given_mask)
      : input(dense(given_input, given_input.scalar_type(), MemoryFormat::ChannelsLast)),
        offset(dense(given_offset, given_offset.scalar_type())),
        weight(dense(given_weight, given_weight.scalar_type(), MemoryFormat::ChannelsLast)) {
    if (given_mask) mask = dense(*given_mask, given_mask->scalar_type());
    pointers.sizes = s;
    pointers.segment = std::gcd(s.group_channels(), s.deform_channels());
    pointers.images = input.const_data_ptr<T>();
    pointers.offsets = offset.const_data_ptr<T>();
    pointers.weights = weight.const_data_ptr<T>();
    pointers.masks = mask ? mask->const_data_ptr<T>() : nullptr;
  }
};

template <typename T>
Planes<T> planes(T* data, const DeformConv2dSizes& s, bool channels_last) {
  const int64_t image_stride = s.out_channels * s.positions();
  return channels_last ? Planes<T>{data, image_stride, 1, s.out_channels}
                       : Planes<T>{data, image_stride, s.positions(), 1};
}

template <typename T>
Tensor forward(const DeformConv2dSizes& s, const Tensor& input, const Tensor& offset, const Tensor& weight,
               const std::optional<Tensor>& bias, const std::optional<Tensor>& mask) {
  const DeviceScope device(input);
  const ScalarType dtype = input.scalar_type();
  const bool channels_last = is_channels_last(input);
  Tensor output = empty_4d(input, {s.batch, s.out_channels, s.out_h, s.out_w}, dtype, channels_last);
  if (output.numel() == 0) return output;
  const DenseOperands<T> operands(s, input, offset, weight, mask);
  const std::optional<Tensor> dense_bias = bias ? std::optional<Tensor>(dense(*bias, dtype)) : std::nullopt;
  const T* bias_data = dense_bias ? dense_bias->const_data_ptr<T>() : nullptr;
  DCN_LAUNCH(forward_kernel<T>, std::min(forward_work(s), kMaxBlocks), kThreads, device.stream(), operands.pointers,
             bias_data, planes(output.mutable_data_ptr<T>(), s, channels_last));
  return output;
}

// Gradients by input, offset, weight and mask; empty where not needed.
template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const DeformConv2dSizes& s, const Tensor& grad, const Tensor& input,
                                                    const Tensor& offset, const Tensor& weight,
                                                    const std::optional<Tensor>& mask, bool need_input,
                                                    bool need_offset, bool need_weight) {
  using A = Accumulate<T>;
  const DeviceScope device(input);
  const ScalarType dtype = input.scalar_type();
  const DenseOperands<T> operands(s, input, offset, weight, mask);
  const Tensor grad_output = as_dense_as(grad, grad, dtype);
  const Planes<const T> grad_planes = planes(grad_output.const_data_ptr<T>(), s, is_channels_last(grad_output));
  const bool launch = s.batch > 0 && s.out_channels > 0;

  const Tensor none = empty_result(grad);
  Tensor grad_input = none, grad_offset = none, grad_weight = none, grad_mask = none;
  SampleGradients<T> gradients{};
  if (need_input) {
    grad_input = empty_4d(input, {s.batch, s.channels, s.height, s.width}, accumulate_type(dtype), true);
    torch::stable::zero_(grad_input);
    gradients.images = grad_input.mutable_data_ptr<A>();
  }
  if (need_offset) {
    grad_offset = torch::stable::new_zeros(offset, offset.sizes());
    gradients.offsets = grad_offset.mutable_data_ptr<T>();
  }
  if (need_offset && mask) {
    grad_mask = torch::stable::new_zeros(*mask, mask->sizes());
    gradients.masks = grad_mask.mutable_data_ptr<T>();
  }
  if (launch && (need_input || need_offset)) {
    DCN_LAUNCH(sample_gradient_kernel<T>, std::min(sample_gradient_work(s), kMaxBlocks), kThreads, device.stream(),
               operands.pointers, grad_planes, gradients);
  }
  if (need_weight) {
    grad_weight =
        empty_4d(weight, {s.out_channels, s.group_channels(), s.kernel_h, s.kernel_w}, accumulate_type(dtype), true);
    torch::stable::zero_(grad_weight);
    if (launch) {
      const int64_t tiles = weight_tiles(operands.pointers);
      const int64_t parts = std::min(divide_up(kEnoughBlocks, tiles), position_tiles(s));
      DCN_LAUNCH(weight_gradient_kernel<T>, std::min(tiles * parts, kMaxBlocks), kThreads, device.stream(),
                 operands.pointers, grad_planes, parts, grad_weight.mutable_data_ptr<A>());
    }
    grad_weight = dense(grad_weight, dtype);
  }
  if (need_input) grad_input = as_dense_as(grad_input, input, dtype);
  return {grad_input, grad_offset, grad_weight, grad_mask};
}

Tensor deform_conv2d(Tensor input, Tensor offset, Tensor weight, std::optional<Tensor> bias,
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                     std::optional<Tensor> mask) {
  const DeformConv2dSizes s = check_deform_conv2d(input, offset, weight, bias, mask, stride, padding, dilation);
  return dispatch(input.scalar_type(),
                  [&](auto zero) { return forward<decltype(zero)>(s, input, offset, weight, bias, mask); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward(
    Tensor grad, Tensor input, Tensor offset, Tensor weight, std::optional<Tensor> mask, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, bool need_input, bool need_offset, bool need_weight) {
  const DeformConv2dSizes s = check_deform_conv2d(input, offset, weight, std::nullopt, mask, stride, padding, dilation);
  check_operand("deform_conv2d_backward", "grad", grad, input, 4);
  check_shape("deform_conv2d_backward", "grad", grad, {s.batch, s.out_channels, s.out_h, s.out_w});
  return dispatch(input.scalar_type(), [&](auto zero) {
    return backward<decltype(zero)>(s, grad, input, offset, weight, mask, need_input, need_offset, need_weight);
  });
}

}  // namespace
}  // namespace dcn::cuda

#if !defined(DCN_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CUDA, m) {
  m.impl("deform_conv2d", TORCH_BOX(&dcn::cuda::deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_BOX(&dcn::cuda::deform_conv2d_backward));
}
#endif
