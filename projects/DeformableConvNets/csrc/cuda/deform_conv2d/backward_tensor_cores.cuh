// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The gradients of deform_conv2d on tensor cores: which sizes their kernels get, and whether they can compute them.
#pragma once

#include "cuda/deform_conv2d/host.cuh"
#include "cuda/deform_conv2d/tensor_cores/list_gather.cuh"
#include "cuda/deform_conv2d/tensor_cores/offset_gradient.cuh"
#include "cuda/deform_conv2d/tensor_cores/weight_gradient.cuh"

namespace dcn::cuda {

// The groups of products over output channels, for all gradients on tensor cores. Nothing where tensor cores cannot
// compute them. `grads` is the gradient by the output.
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

// Calls make(lists) for the lists of all images, some images at a time.
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

// Computes the gradient by the input, or returns false where tensor cores cannot.
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

// Computes the gradients by offset and mask, or returns false where tensor cores cannot.
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

// Computes partial gradients by the weight, or returns false where tensor cores cannot.
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

}  // namespace dcn::cuda
