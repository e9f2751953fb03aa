// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_conv2d on CUDA: entry points.
#include "deform_conv2d_simt.cuh"
#include "layout.cuh"
#include "plan.h"

namespace dcn::cuda {
namespace {

template <typename T>
Planes<T> planes(T* data, const DeformConv2dSizes& s, bool channels_last) {
  const int64_t image_stride = s.out_channels * s.positions();
  return channels_last ? Planes<T>{data, image_stride, 1, s.out_channels}
                       : Planes<T>{data, image_stride, s.positions(), 1};
}

// Keeps the tensors alive that the kernels read. Copies only what the kernels cannot read as it lies.
template <typename T>
struct DenseOperands {
  Tensor input, offset, weight;
  std::optional<Tensor> mask;
  Operands<T> pointers;

  DenseOperands(const DeviceScope& device, const DeformConv2dSizes& s, const Tensor& given_input,
                const Tensor& given_offset, const Tensor& given_weight, const std::optional<Tensor>& given_mask)
      : input(to_channels_last<T>(given_input, 1, device.stream())),
        offset(with_flat_planes(given_offset)),
        weight(with_flat_planes(given_weight)) {
    if (given_mask) mask = with_flat_planes(*given_mask);
    pointers.sizes = s;
    pointers.segment = std::gcd(s.group_channels(), s.deform_channels());
    pointers.images = input.const_data_ptr<T>();
    pointers.offsets = {offset.const_data_ptr<T>(), offset.stride(0), offset.stride(1), offset.stride(3)};
    pointers.masks = mask
                         ? Planes<const T>{mask->const_data_ptr<T>(), mask->stride(0), mask->stride(1), mask->stride(3)}
                         : Planes<const T>{};
    pointers.weights = {weight.const_data_ptr<T>(), weight.stride(0), weight.stride(1), weight.stride(3)};
  }

 private:
  // With one stride for rows and columns together.
  static Tensor with_flat_planes(const Tensor& tensor) {
    const bool flat = tensor.stride(2) == tensor.stride(3) * tensor.size(3);
    return flat ? tensor : dense(tensor, tensor.scalar_type());
  }
};

// Runs the product with tiles of 64, 128 or 256 columns, whichever `cut` says.
template <Kind kKind, typename Gather, typename... Arguments>
void run_cut_product(const Cut& cut, const DeviceScope& device, const Arguments&... arguments) {
  switch (cut.columns) {
    case 64:
      return run_product<kKind, 64, Gather>(device, arguments..., cut.splits);
    case 128:
      return run_product<kKind, 128, Gather>(device, arguments..., cut.splits);
    default:
      // Results of 32 bits would not fit into shared memory on their way to global memory.
      if constexpr (kUnitElements<kKind> == 8) run_product<kKind, 256, Gather>(device, arguments..., cut.splits);
  }
}

template <Kind kKind, typename Gather>
int64_t most_columns(const Device& device) {
  if constexpr (kUnitElements<kKind> == 8) {
    if (product_bytes<kKind, 256, Gather>() <= device.shared_bytes) return 256;
  }
  return product_bytes<kKind, 128, Gather>() <= device.shared_bytes ? 128 : 64;
}

// The forward product on tensor cores. False where they cannot compute it.
template <Kind kKind>
bool forward_on_tensor_cores(const DeviceScope& scope, const Operands<Element<kKind>>& operands, const Tensor& input,
                             const Element<kKind>* bias, const Planes<Element<kKind>>& output) {
  constexpr int kUnit = kUnitElements<kKind>;
  const DeformConv2dSizes& s = operands.sizes;
  const Device device = scope.device();
  using Gather = SampleGather<kKind>;
  const std::optional<Grouping> groups = grouping(s, kUnit, false);
  if (!groups || !fits_tensor_cores(s, device, operands.images, kUnit)) return false;
  if (compiled_capability(product_kernel<kKind, 64, Gather>) < 80) return false;
  const int deform_channels = static_cast<int>(s.deform_channels());
  const int segment = std::gcd(groups->channels, deform_channels);
  ProductSizes sizes{};
  sizes.packing.reduction = {static_cast<int>(s.taps()), groups->channels / segment, segment / kUnit};
  sizes.packing.segments = groups->groups, sizes.packing.columns = groups->outputs;
  sizes.packing.group_columns = groups->outputs, sizes.packing.group_channels = groups->channels;
  sizes.packing.outputs = true;
  sizes.packing.conv_outputs = static_cast<int>(s.group_out_channels());
  sizes.packing.conv_channels = static_cast<int>(s.group_channels());
  sizes.rows = static_cast<int>(s.batch * s.positions()), sizes.image_rows = static_cast<int>(s.positions());
  sizes.columns = static_cast<int>(s.out_channels);
  const Gather gather{operands, {groups->outputs, groups->channels, deform_channels, segment / kUnit}};
  const Cut cut = cut_product(sizes, device.multiprocessors, most_columns<kKind, Gather>(device));
  run_cut_product<kKind, Gather>(cut, scope, input, sizes, gather, operands.weights, bias, output);
  return true;
}

// The same in the kind that goes with T.
template <typename T>
bool forward_on_tensor_cores(const DeviceScope& scope, const Operands<T>& operands, const Tensor& input, const T* bias,
                             const Planes<T>& output, bool allow_tf32) {
  if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
    return forward_on_tensor_cores<Kind::kHalf>(scope, operands, input, bias, output);
  } else if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    return forward_on_tensor_cores<Kind::kBFloat16>(scope, operands, input, bias, output);
  } else if constexpr (std::is_same_v<T, float>) {
    return allow_tf32 ? forward_on_tensor_cores<Kind::kTF32>(scope, operands, input, bias, output)
                      : forward_on_tensor_cores<Kind::kFloat32>(scope, operands, input, bias, output);
  } else {
    return false;
  }
}

template <typename T>
Tensor forward(const DeformConv2dSizes& s, const Tensor& input, const Tensor& offset, const Tensor& weight,
               const std::optional<Tensor>& bias, const std::optional<Tensor>& mask, bool allow_tf32) {
  const DeviceScope device(input);
  const ScalarType dtype = input.scalar_type();
  const bool channels_last = is_channels_last(input);
  Tensor output = empty_4d(input, {s.batch, s.out_channels, s.out_h, s.out_w}, dtype, channels_last);
  if (output.numel() == 0) return output;
  const DenseOperands<T> operands(device, s, input, offset, weight, mask);
  const std::optional<Tensor> dense_bias = bias ? std::optional<Tensor>(dense(*bias, dtype)) : std::nullopt;
  const T* bias_data = dense_bias ? dense_bias->const_data_ptr<T>() : nullptr;
  const Planes<T> output_planes = planes(output.mutable_data_ptr<T>(), s, channels_last);
  if (forward_on_tensor_cores(device, operands.pointers, input, bias_data, output_planes, allow_tf32)) return output;
  DCN_LAUNCH(forward_kernel<T>, std::min(forward_work(s), kMaxBlocks), kThreads, device.stream(), operands.pointers,
             bias_data, output_planes);
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
  const DenseOperands<T> operands(device, s, input, offset, weight, mask);
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
                     std::optional<Tensor> mask, bool allow_tf32) {
  const DeformConv2dSizes s = check_deform_conv2d(input, offset, weight, bias, mask, stride, padding, dilation);
  return dispatch(input.scalar_type(),
                  [&](auto zero) { return forward<decltype(zero)>(s, input, offset, weight, bias, mask, allow_tf32); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward(
    Tensor grad, Tensor input, Tensor offset, Tensor weight, std::optional<Tensor> mask, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, bool need_input, bool need_offset, bool need_weight,
    [[maybe_unused]] bool allow_tf32) {
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
  m.impl("_deform_conv2d", TORCH_BOX(&dcn::cuda::deform_conv2d));
  m.impl("_deform_conv2d_backward", TORCH_BOX(&dcn::cuda::deform_conv2d_backward));
}
#endif
