// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// What the entry points of deform_conv2d share: the tensors that kernels read, and the choice of tensor-core kernels.
#pragma once

#include <numeric>

#include "cuda/deform_conv2d/plan.cuh"
#include "cuda/deform_conv2d/tensor_cores/product.cuh"
#include "cuda/deform_conv2d/tf32.cuh"
#include "cuda/memory_format.cuh"

namespace dcn::cuda {

// A dense tensor (batch, channels, positions), channels_last or contiguous.
template <typename T>
PlanesView<T> planes(T* data, int64_t channels, int64_t positions, bool channels_last) {
  return channels_last ? PlanesView<T>{data, channels * positions, 1, channels}
                       : PlanesView<T>{data, channels * positions, positions, 1};
}

// The tensors that the kernels read, kept alive. Copies only what the kernels cannot read as it lies.
template <typename T>
struct OperandTensors {
  Tensor input, offset, weight;
  std::optional<Tensor> mask;
  OperandsView<T> view{};

  OperandTensors(const DeviceScope& device, const DeformConv2dSizes& s, const Tensor& given_input,
                 const SamplingInputs& sampling, const Tensor& given_weight)
      : input(to_channels_last<T>(given_input, 1, device.stream())),
        offset(with_flat_planes(sampling.offset)),
        weight(with_flat_planes(given_weight)) {
    if (sampling.mask) mask = with_flat_planes(*sampling.mask);
    view.sizes = s;
    view.segment = std::gcd(s.group_channels(), s.deform_channels());
    view.images = input.const_data_ptr<T>();
    view.offsets = {offset.const_data_ptr<T>(), offset.stride(0), offset.stride(1), plane_stride(offset)};
    if (mask) view.masks = {mask->const_data_ptr<T>(), mask->stride(0), mask->stride(1), plane_stride(*mask)};
    view.logits = sampling.branch_output.has_value();
    view.weights = {weight.const_data_ptr<T>(), weight.stride(0), weight.stride(1), plane_stride(weight)};
  }

 private:
  // The tensor, or a copy, in which one stride leads from position to position, over the ends of rows.
  static Tensor with_flat_planes(const Tensor& tensor) {
    const bool line = tensor.size(2) == 1 || tensor.size(3) == 1;
    const bool flat = line || tensor.stride(2) == tensor.stride(3) * tensor.size(3);
    return flat ? tensor : dense(tensor, tensor.scalar_type());
  }
  // That stride. Strides of dimensions of size 1 mean nothing, even in tensors that torch calls contiguous.
  static int64_t plane_stride(const Tensor& tensor) {
    return tensor.size(3) == 1 ? tensor.stride(2) : tensor.stride(3);
  }
};

// Calls function(KindConstant) with the kind of product for T and returns its result, or false where there is no kind.
template <typename T, typename Function>
bool with_kind(bool allow_tf32, const Function& function) {
  if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
    return function(KindConstant<Kind::kHalf>());
  } else if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    return function(KindConstant<Kind::kBFloat16>());
  } else if constexpr (std::is_same_v<T, float>) {
    return allow_tf32 ? function(KindConstant<Kind::kTF32>()) : function(KindConstant<Kind::kFloat32>());
  } else {
    return false;
  }
}

// Whether a tile may have 256 columns (wide) or 128 (middle). Where not, registers would not suffice.
template <Kind kKind, typename Gather>
constexpr bool kWideTiles = kChunkElements<kKind> == 8 || (kKind == Kind::kTF32 && Gather::kLean);
template <Kind kKind, typename Gather>
constexpr bool kMiddleTiles = kKind != Kind::kFloat32 || Gather::kLean;

template <Kind kKind, typename Gather>
int64_t most_columns(const Device& device) {
  if constexpr (kWideTiles<kKind, Gather>) {
    if (product_bytes<kKind, 256, Gather>() <= device.shared_bytes) return 256;
  }
  if constexpr (kMiddleTiles<kKind, Gather>) {
    if (product_bytes<kKind, 128, Gather>() <= device.shared_bytes) return 128;
  }
  return 64;
}

// Runs the product with the tiles and splits that cut_product estimates to be the fastest.
template <Kind kKind, typename Gather, typename... Arguments>
void run_cut_product(const DeviceScope& device, const Tensor& like, const ProductSizes& sizes,
                     const Arguments&... arguments) {
  const Device properties = device.device();
  const Cut cut = cut_product(sizes, properties.multiprocessors, most_columns<kKind, Gather>(properties));
  if constexpr (kWideTiles<kKind, Gather>) {
    if (cut.columns == 256) return run_product<kKind, 256, Gather>(device, like, sizes, arguments..., cut.splits);
  }
  if constexpr (kMiddleTiles<kKind, Gather>) {
    if (cut.columns == 128) return run_product<kKind, 128, Gather>(device, like, sizes, arguments..., cut.splits);
  }
  run_product<kKind, 64, Gather>(device, like, sizes, arguments..., cut.splits);
}

}  // namespace dcn::cuda
