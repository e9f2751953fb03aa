// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_conv2d on CUDA: backward entry point. No gradient depends on the order in which threads happen to run.
#include "cuda/deform_conv2d/host.cuh"
#include "cuda/deform_conv2d/simt/kernels.cuh"
#include "cuda/deform_conv2d/tensor_cores/list_gather.cuh"
#include "cuda/deform_conv2d/tensor_cores/offset_gradient.cuh"
#include "cuda/deform_conv2d/tensor_cores/weight_gradient.cuh"

namespace dcn::cuda {
namespace {

// The sizes of products over output channels, and what else the gradients on tensor cores have in common. Nothing
// where they cannot compute them.
template <Kind kKind>
std::optional<Grouping> backward_grouping(const Device& device, const OperandsView<Element<kKind>>& operands,
                                          const void* grads) {
  constexpr int kChunk = kChunkElements<kKind>;
  if (!fits_tensor_cores(operands.sizes, device, operands.images, kChunk)) return std::nullopt;
  if (reinterpret_cast<uintptr_t>(grads) % kChunkBytes != 0) return std::nullopt;
  if (compiled_capability(offset_gradient_kernel<kKind>) < 80) return std::nullopt;
  return grouping(operands.sizes, kChunk, true);
}

// Columns are input channels, stripe by stripe. Summed over are the output channels of a group.
inline Packing transposed_packing(const DeformConv2dSizes& s, const Grouping& groups, int chunk) {
  Packing packing = packing_of(s);
  packing.columns = std::gcd(groups.channels, static_cast<int>(s.deform_channels()));
  packing.stripes = static_cast<int>(s.channels) / packing.columns;
  packing.group_columns = groups.channels, packing.group_channels = groups.outputs;
  packing.outputs = false;
  packing.reduction = {static_cast<int>(s.taps()), 1, groups.outputs / chunk};
  return packing;
}

// Calls make(lists) for lists of some images after the other.
template <typename T, typename Make>
void for_listed_images(const DeviceScope& device, const OperandsView<T>& operands, const Tensor& like,
                       const Make& make) {
  using A = Accumulate<T>;
  const int64_t batch = operands.sizes.batch, step = listed_images<A>(operands.sizes);
  for (int64_t first = 0; first < batch; first += step) {
    const SampleListTensors<A> lists(device, operands, like, first, std::min(step, batch - first));
    make(lists.view);
  }
}

template <Kind kKind>
bool input_gradient_on_tensor_cores(KindConstant<kKind>, const DeviceScope& device,
                                    const OperandsView<Element<kKind>>& operands, const Tensor& input,
                                    const Element<kKind>* grads, const PlanesView<Element<kKind>>& gradient) {
  constexpr int kChunk = kChunkElements<kKind>;
  using Gather = ListGather<kKind>;
  const DeformConv2dSizes& s = operands.sizes;
  const std::optional<Grouping> groups = backward_grouping<kKind>(device.device(), operands, grads);
  if (!groups) return false;
  for_listed_images(device, operands, input, [&](const SampleListsView<float>& lists) {
    ProductSizes sizes{};
    sizes.packing = transposed_packing(s, *groups, kChunk);
    sizes.rows = static_cast<int>(lists.images * s.pixels()), sizes.image_rows = static_cast<int>(s.pixels());
    sizes.order = {static_cast<int>(s.width), static_cast<int>(s.height)};
    sizes.columns = static_cast<int>(s.channels);
    const Gather gather{s,
                        lists,
                        grads + lists.first_image * s.positions() * s.out_channels,
                        groups->channels,
                        groups->outputs,
                        static_cast<uint32_t>(s.out_channels * sizeof(Element<kKind>))};
    PlanesView<Element<kKind>> images = gradient;
    images.data += lists.first_image * images.image_stride;
    const Element<kKind>* no_bias = nullptr;
    run_cut_product<kKind, Gather>(device, input, sizes, gather, operands.weights, no_bias, images);
  });
  return true;
}

template <Kind kKind>
bool offset_gradient_on_tensor_cores(KindConstant<kKind>, const DeviceScope& device,
                                     const OperandsView<Element<kKind>>& operands, const Tensor& input,
                                     const Element<kKind>* grads,
                                     const SampleGradientsView<Element<kKind>>& gradients) {
  constexpr int kChunk = kChunkElements<kKind>;
  const DeformConv2dSizes& s = operands.sizes;
  const std::optional<Grouping> groups = backward_grouping<kKind>(device.device(), operands, grads);
  if (!groups) return false;
  OffsetGradientSizes sizes{};
  Packing& packing = sizes.packing = transposed_packing(s, *groups, kChunk);
  packing.outer_taps = packing.reduction.taps, packing.reduction.taps = 1;
  packing.permuted = true;
  sizes.stripe_tiles = (packing.columns + kOffsetColumns - 1) / kOffsetColumns;
  packing.padded = sizes.stripe_tiles * kOffsetColumns;
  sizes.rows = static_cast<int>(s.batch * s.positions()), sizes.positions = static_cast<int>(s.positions());
  sizes.deform_stripes = static_cast<int>(s.deform_channels()) / packing.columns;
  const PackedWeightTensor packed(KindConstant<kKind>(), device, input, packing, operands.weights);
  DCN_LAUNCH_SHARED(offset_gradient_kernel<kKind>, sizes.row_tiles() * s.deform_groups * s.taps(), kProductThreads,
                    sizeof(OffsetGradientShared), device.stream(), sizes, operands, grads, packed.chunks(), gradients);
  return true;
}

// Partial gradients (splits, out_channels, taps, group_channels).
template <typename A>
struct PartialGradientTensor {
  Tensor tensor;
  int64_t splits;

  PartialGradientTensor(const DeformConv2dSizes& s, const Tensor& like, int64_t given_splits)
      : tensor(torch::stable::empty(std::array<int64_t, 4>{given_splits, s.out_channels, s.taps(), s.group_channels()},
                                    std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float, std::nullopt,
                                    like.device())),
        splits(given_splits) {}
};

template <Kind kKind, int kOutputs, int kChannels>
void run_weight_gradient(const DeviceScope& device, WeightGradientSizes sizes,
                         const OperandsView<Element<kKind>>& operands, const Tensor& like, const Element<kKind>* grads,
                         std::optional<PartialGradientTensor<float>>& partials) {
  using Tile = WeightGradientTile<kKind, kOutputs, kChannels>;
  constexpr int64_t kBytes = sizeof(typename Tile::Shared);
  sizes.segment_tiles = (sizes.reduction.chunks * kChunkElements<kKind> + kChannels - 1) / kChannels;
  sizes.output_tiles = (sizes.group_outputs + kOutputs - 1) / kOutputs;
  sizes.splits = 1;
  const Device properties = device.device();
  const int64_t blocks =
      resident_blocks(properties, kBytes, weight_gradient_blocks(kKind, kOutputs, kChannels, properties.capability));
  const int64_t bytes = operands.sizes.out_channels * operands.sizes.taps() * sizes.conv_channels * 4;
  sizes.splits = weight_gradient_splits(sizes.work(), divide_up(sizes.rows, Tile::kPositions),
                                        blocks * properties.multiprocessors, bytes);
  partials.emplace(operands.sizes, like, sizes.splits);
  const auto kernel = weight_gradient_tensor_kernel<kKind, kOutputs, kChannels>;
  DCN_LAUNCH_SHARED(kernel, sizes.work(), kProductThreads, kBytes, device.stream(), sizes, operands, grads,
                    partials->tensor.template mutable_data_ptr<float>());
}

template <Kind kKind>
bool weight_gradient_on_tensor_cores(KindConstant<kKind>, const DeviceScope& device,
                                     const OperandsView<Element<kKind>>& operands, const Tensor& input,
                                     const Element<kKind>* grads,
                                     std::optional<PartialGradientTensor<float>>& partials) {
  constexpr int kChunk = kChunkElements<kKind>;
  const DeformConv2dSizes& s = operands.sizes;
  const std::optional<Grouping> groups = backward_grouping<kKind>(device.device(), operands, grads);
  if (!groups) return false;
  const int segment = std::gcd(groups->channels, static_cast<int>(s.deform_channels()));
  WeightGradientSizes sizes{};
  sizes.reduction = {static_cast<int>(s.taps()), groups->channels / segment, segment / kChunk};
  sizes.groups = groups->groups, sizes.group_channels = groups->channels, sizes.group_outputs = groups->outputs;
  sizes.conv_channels = static_cast<int>(s.group_channels());
  sizes.conv_outputs = static_cast<int>(s.group_out_channels());
  sizes.rows = static_cast<int>(s.batch * s.positions()), sizes.positions = static_cast<int>(s.positions());
  sizes.deform_channels = static_cast<int>(s.deform_channels());
  // The more output channels a block has, the less often samples are gathered.
  if constexpr (kKind != Kind::kFloat32) {
    if (groups->outputs > 128) {
      run_weight_gradient<kKind, 256, 64>(device, sizes, operands, input, grads, partials);
      return true;
    }
    if (segment > 64) {
      run_weight_gradient<kKind, 128, 128>(device, sizes, operands, input, grads, partials);
      return true;
    }
  }
  run_weight_gradient<kKind, 128, 64>(device, sizes, operands, input, grads, partials);
  return true;
}

// Gradients by input, offset, weight and mask; empty where not needed.
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

  // Of the tensors that the caller gave: the mask's is left as it is without a mask or where both are one tensor.
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
  // Makes a tensor for gradients by offsets or masks. Kernels write all of it, or else it is zero.
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
  m.impl("_deform_conv2d_backward", TORCH_BOX(&dcn::cuda::deform_conv2d_backward));
  m.impl("_modulated_deform_conv2d_backward", TORCH_BOX(&dcn::cuda::modulated_deform_conv2d_backward));
}
#endif
