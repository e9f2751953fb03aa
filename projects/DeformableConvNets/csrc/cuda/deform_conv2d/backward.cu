// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_conv2d on CUDA: backward entry points. No gradient depends on the order in which threads happen to run.
#include "cuda/deform_conv2d/backward_tensor_cores.cuh"
#include "cuda/deform_conv2d/simt/backward.cuh"

namespace dcn::cuda {
namespace {

// Computes the gradients by input, offset, weight and mask, each where it is asked for.
template <typename T>
class Backward {
 public:
  Backward(const DeformConv2dSizes& sizes, const Tensor& grad, const Tensor& given_input,
           const SamplingInputs& sampling, const Tensor& weight, bool allow_tf32)
      : s_(sizes),
        device_(given_input),
        input_(given_input),
        sampling_(sampling),
        weight_(weight),
        operands_(device_, sizes, given_input, sampling, weight),
        grad_(to_channels_last<T>(grad, 1, device_.stream())),
        grads_(grad_.const_data_ptr<T>()),
        grad_planes_(planes(grads_, sizes.out_channels, sizes.positions(), true)),
        allow_tf32_(allow_tf32),
        empty_(sizes.batch == 0 || sizes.out_channels == 0 || sizes.channels == 0) {}

  Tensor by_input() const {
    const bool channels_last = is_channels_last(input_);
    Tensor gradient =
        empty_4d(input_, {s_.batch, s_.channels, s_.height, s_.width}, input_.scalar_type(), channels_last);
    if (empty_ || s_.pixels() == 0) return torch::stable::zero_(gradient);
    const PlanesView<T> result = planes(gradient.mutable_data_ptr<T>(), s_.channels, s_.pixels(), channels_last);
    const OperandsView<T>& operands = operands_.view;
    if (with_kind<T>(allow_tf32_, [&](auto kind) {
          return input_gradient_on_tensor_cores(kind, device_, operands, input_, grads_, result);
        })) {
      return gradient;
    }
    for_listed_images(device_, operands, input_, [&](const SampleListsView<Accumulate<T>>& lists) {
      const int64_t work = input_gradient_work(s_, operands.segment, lists.images);
      DCN_LAUNCH(input_gradient_kernel<T>, std::min(work, kMaxBlocks), kThreads, device_.stream(), operands, lists,
                 grad_planes_, result);
    });
    return gradient;
  }

  // The gradients by the tensors that the caller gave. `grad_mask` stays as it is if there is no mask, or if offset and
  // mask came in one tensor: then `grad_offset` is the gradient by that.
  void by_offset_and_mask(Tensor& grad_offset, Tensor& grad_mask) const {
    const int64_t channels = s_.deform_groups * s_.taps();
    SampleGradientsView<T> gradients{};
    if (sampling_.branch_output) {
      const bool channels_last = is_channels_last(*sampling_.branch_output);
      gradients.offsets = allocate(grad_offset, 3 * channels, channels_last);
      gradients.masks = gradients.offsets;
      gradients.masks.data += 2 * channels * gradients.masks.channel_stride;
    } else {
      gradients.offsets = allocate(grad_offset, 2 * channels, false);
      if (sampling_.mask) gradients.masks = allocate(grad_mask, channels, false);
    }
    const OperandsView<T>& operands = operands_.view;
    if (empty_ || with_kind<T>(allow_tf32_, [&](auto kind) {
          return offset_gradient_on_tensor_cores(kind, device_, operands, input_, grads_, gradients);
        })) {
      return;
    }
    DCN_LAUNCH(sample_gradient_kernel<T>, std::min(sample_gradient_work(s_), kMaxBlocks), kThreads, device_.stream(),
               operands, grad_planes_, gradients);
  }

  Tensor by_weight() const {
    const bool channels_last = is_channels_last(weight_);
    Tensor gradient = empty_4d(weight_, {s_.out_channels, s_.group_channels(), s_.kernel_h, s_.kernel_w},
                               input_.scalar_type(), channels_last);
    if (empty_) return torch::stable::zero_(gradient);
    std::optional<PartialGradientTensor<Accumulate<T>>> partials;
    const OperandsView<T>& operands = operands_.view;
    const bool done = with_kind<T>(allow_tf32_, [&](auto kind) {
      return weight_gradient_on_tensor_cores(kind, device_, operands, input_, grads_, partials);
    });
    if (!done) {
      const int64_t tiles = weight_tiles(operands);
      partials.emplace(s_, input_, std::min(divide_up(kEnoughBlocks, tiles), position_tiles(s_)));
      DCN_LAUNCH(weight_gradient_kernel<T>, std::min(tiles * partials->splits, kMaxBlocks), kThreads, device_.stream(),
                 operands, grad_planes_, partials->splits, partials->tensor.template mutable_data_ptr<Accumulate<T>>());
    }
    DCN_LAUNCH(finish_weight_gradient_kernel<T>, std::min(divide_up(gradient.numel(), 256), kMaxBlocks), 256,
               device_.stream(), partials->tensor.template const_data_ptr<Accumulate<T>>(), partials->splits,
               s_.out_channels, s_.taps(), s_.group_channels(), channels_last, gradient.mutable_data_ptr<T>());
    return gradient;
  }

 private:
  // Makes a tensor for the gradient by offset or mask. Kernels write all of it; where none runs it is zero.
  PlanesView<T> allocate(Tensor& gradient, int64_t channels, bool channels_last) const {
    gradient = empty_4d(input_, {s_.batch, channels, s_.out_h, s_.out_w}, input_.scalar_type(), channels_last);
    if (empty_) torch::stable::zero_(gradient);
    return planes(gradient.mutable_data_ptr<T>(), channels, s_.positions(), channels_last);
  }

  DeformConv2dSizes s_;
  DeviceScope device_;
  Tensor input_;
  SamplingInputs sampling_;
  Tensor weight_;
  OperandTensors<T> operands_;
  Tensor grad_;  // channels_last
  const T* grads_;
  PlanesView<const T> grad_planes_;
  bool allow_tf32_, empty_;
};

// Gradients by input, offset (or the branch's output), weight and mask; empty where not needed.
std::array<Tensor, 4> backward(const char* op, const DeformConv2dSizes& s, const Tensor& grad, const Tensor& input,
                               const SamplingInputs& sampling, const Tensor& weight, const NeededGradients& need,
                               bool allow_tf32) {
  check_operand(op, "grad", grad, input, 4);
  check_shape(op, "grad", grad, {s.batch, s.out_channels, s.out_h, s.out_w});
  return in_dtype(input.scalar_type(), [&](auto zero) {
    const Backward<decltype(zero)> backward(s, grad, input, sampling, weight, allow_tf32);
    Tensor grad_offset = empty_result(grad), grad_mask = empty_result(grad);
    if (need.offset) backward.by_offset_and_mask(grad_offset, grad_mask);
    return std::array<Tensor, 4>{need.input ? backward.by_input() : empty_result(grad), grad_offset,
                                 need.weight ? backward.by_weight() : empty_result(grad), grad_mask};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset,
                                                                  Tensor weight, std::optional<Tensor> mask,
                                                                  std::vector<int64_t> stride,
                                                                  std::vector<int64_t> padding,
                                                                  std::vector<int64_t> dilation, bool need_input,
                                                                  bool need_offset, bool need_weight, bool allow_tf32) {
  const SamplingInputs sampling{offset, mask, std::nullopt};
  const DeformConv2dSizes s = check_deform_conv2d(input, sampling, weight, std::nullopt, stride, padding, dilation);
  const auto found = backward("deform_conv2d_backward", s, grad, input, sampling, weight,
                              {need_input, need_offset, need_weight}, allow_tf32);
  return {found[0], found[1], found[2], found[3]};
}

std::tuple<Tensor, Tensor, Tensor> modulated_deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset_and_mask,
                                                                    Tensor weight, std::vector<int64_t> stride,
                                                                    std::vector<int64_t> padding,
                                                                    std::vector<int64_t> dilation, bool need_input,
                                                                    bool need_offset, bool need_weight,
                                                                    bool allow_tf32) {
  const SamplingInputs sampling = split_branch_output(offset_and_mask, weight);
  const DeformConv2dSizes s = check_deform_conv2d(input, sampling, weight, std::nullopt, stride, padding, dilation);
  const auto found = backward("modulated_deform_conv2d_backward", s, grad, input, sampling, weight,
                              {need_input, need_offset, need_weight}, allow_tf32);
  return {found[0], found[1], found[2]};
}

}  // namespace
}  // namespace dcn::cuda

#if !defined(DCN_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CUDA, m) {
  m.impl("deform_conv2d_backward", dcn::cuda::with_tf32_setting<TORCH_BOX(&dcn::cuda::deform_conv2d_backward)>);
  m.impl("modulated_deform_conv2d_backward",
         dcn::cuda::with_tf32_setting<TORCH_BOX(&dcn::cuda::modulated_deform_conv2d_backward)>);
}
#endif
