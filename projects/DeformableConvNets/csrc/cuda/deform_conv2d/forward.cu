// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_conv2d on CUDA: forward entry points.
#include "cuda/deform_conv2d/host.cuh"
#include "cuda/deform_conv2d/simt/forward.cuh"

namespace dcn::cuda {
namespace {

// Computes the output on tensor cores, or returns false where they cannot.
template <Kind kKind>
bool forward_on_tensor_cores(KindConstant<kKind>, const DeviceScope& device,
                             const OperandsView<Element<kKind>>& operands, const Tensor& input,
                             const Element<kKind>* bias, const PlanesView<Element<kKind>>& output) {
  constexpr int kChunk = kChunkElements<kKind>;
  using Gather = SampleGather<kKind>;
  const DeformConv2dSizes& s = operands.sizes;
  const std::optional<Grouping> groups = grouping(s, kChunk, false);
  if (!groups || !fits_tensor_cores(s, device.device(), operands.images, kChunk)) return false;
  if (compiled_capability(product_kernel<kKind, 64, Gather>) < 80) return false;
  const int deform_channels = static_cast<int>(s.deform_channels());
  const int segment = std::gcd(groups->channels, deform_channels);
  ProductSizes sizes{};
  sizes.packing = packing_of(s);
  sizes.packing.reduction = {static_cast<int>(s.taps()), groups->channels / segment, segment / kChunk};
  sizes.packing.stripes = groups->groups, sizes.packing.columns = groups->outputs;
  sizes.packing.group_columns = groups->outputs, sizes.packing.group_channels = groups->channels;
  sizes.packing.outputs = true;
  sizes.rows = static_cast<int>(s.batch * s.positions()), sizes.image_rows = static_cast<int>(s.positions());
  sizes.order = {sizes.image_rows, 1};  // patches halve what is read from the second-level cache, and gain no time
  sizes.columns = static_cast<int>(s.out_channels);
  const Gather gather{
      operands,
      {groups->outputs, groups->channels, deform_channels, segment / kChunk, static_cast<int>(s.channels / kChunk)}};
  run_cut_product<kKind, Gather>(device, input, sizes, gather, operands.weights, bias, output);
  return true;
}

template <typename T>
Tensor forward(const DeformConv2dSizes& s, const Tensor& input, const SamplingInputs& sampling, const Tensor& weight,
               const std::optional<Tensor>& bias, bool allow_tf32) {
  const DeviceScope device(input);
  const ScalarType dtype = input.scalar_type();
  const bool channels_last = is_channels_last(input);
  Tensor output = empty_4d(input, {s.batch, s.out_channels, s.out_h, s.out_w}, dtype, channels_last);
  if (output.numel() == 0) return output;
  const OperandTensors<T> operands(device, s, input, sampling, weight);
  const std::optional<Tensor> dense_bias = bias ? std::optional<Tensor>(dense(*bias, dtype)) : std::nullopt;
  const T* bias_data = dense_bias ? dense_bias->const_data_ptr<T>() : nullptr;
  const PlanesView<T> output_planes =
      planes(output.mutable_data_ptr<T>(), s.out_channels, s.positions(), channels_last);
  if (with_kind<T>(allow_tf32, [&](auto kind) {
        return forward_on_tensor_cores(kind, device, operands.view, input, bias_data, output_planes);
      })) {
    return output;
  }
  DCN_LAUNCH(forward_kernel<T>, std::min(forward_work(s), kMaxBlocks), kThreads, device.stream(), operands.view,
             bias_data, output_planes);
  return output;
}

Tensor deform_conv2d(Tensor input, Tensor offset, Tensor weight, std::optional<Tensor> bias,
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                     std::optional<Tensor> mask, bool allow_tf32) {
  const SamplingInputs sampling{offset, mask, std::nullopt};
  const DeformConv2dSizes s = check_deform_conv2d(input, sampling, weight, bias, stride, padding, dilation);
  return in_dtype(input.scalar_type(),
                  [&](auto zero) { return forward<decltype(zero)>(s, input, sampling, weight, bias, allow_tf32); });
}

Tensor modulated_deform_conv2d(Tensor input, Tensor offset_and_mask, Tensor weight, std::optional<Tensor> bias,
                               std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                               bool allow_tf32) {
  const SamplingInputs sampling = split_branch_output(offset_and_mask, weight);
  const DeformConv2dSizes s = check_deform_conv2d(input, sampling, weight, bias, stride, padding, dilation);
  return in_dtype(input.scalar_type(),
                  [&](auto zero) { return forward<decltype(zero)>(s, input, sampling, weight, bias, allow_tf32); });
}

}  // namespace
}  // namespace dcn::cuda

#if !defined(DCN_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CUDA, m) {
  m.impl("deform_conv2d", dcn::cuda::with_tf32_setting<TORCH_BOX(&dcn::cuda::deform_conv2d)>);
  m.impl("modulated_deform_conv2d", dcn::cuda::with_tf32_setting<TORCH_BOX(&dcn::cuda::modulated_deform_conv2d)>);
}
#endif
