// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// RoI pooling on CUDA: what the entry points of all such operators do. Where bins sample is the operator's geometry:
// roi_pool_sizes.h says what that is.
#pragma once

#include "cuda/roi_pool/kernels.cuh"

namespace dcn::cuda {

// The dense tensors that the kernels read, kept alive.
template <typename T>
struct RoiPoolOperandTensors {
  Tensor input, rois;
  std::optional<Tensor> offset, mask;
  RoiPoolOperandsView<T> view;

  template <typename Stream>
  RoiPoolOperandTensors(const RoiPoolSizes& s, const RoiPoolInputs& given, Stream stream)
      : input(to_channels_last<T>(given.input, s.cells, stream)),
        rois(dense(given.rois, accumulate_type(given.input.scalar_type()))) {
    if (given.offset) offset = dense(*given.offset, given.offset->scalar_type());
    if (given.mask) mask = dense(*given.mask, given.mask->scalar_type());
    view.sizes = s;
    view.images = input.template const_data_ptr<T>();
    view.rois = rois.template const_data_ptr<Accumulate<T>>();
    view.offsets = offset ? offset->template const_data_ptr<T>() : nullptr;
    view.masks = mask ? mask->template const_data_ptr<T>() : nullptr;
  }

  // Whether every lane can read vectors of `count` channels.
  bool has_vectors(int count) const {
    const bool aligned = reinterpret_cast<uintptr_t>(view.images) % (count * sizeof(T)) == 0;
    return aligned && view.sizes.set_channels() % count == 0;
  }
};

inline int64_t roi_pool_blocks(const RoiPoolSizes& s) { return std::min(bin_tiles(s), kMaxBlocks); }

template <typename T, template <typename> class Geometry>
Tensor roi_pool_forward(const RoiPoolSizes& s, const Geometry<Accumulate<T>>& geometry, const RoiPoolInputs& given) {
  const Tensor& input = given.input;
  const DeviceScope device(input);
  Tensor output = empty_4d(input, {s.rois, s.channels, s.out_h, s.out_w}, input.scalar_type(), false);
  if (output.numel() == 0) return output;
  const RoiPoolOperandTensors<T> operands(s, given, device.stream());
  constexpr int kVector = 16 / sizeof(T);
  const auto kernel =
      operands.has_vectors(kVector) ? roi_pool_kernel<T, Geometry, kVector> : roi_pool_kernel<T, Geometry, 1>;
  DCN_LAUNCH(kernel, roi_pool_blocks(s), kRoiThreads, device.stream(), operands.view, geometry,
             output.mutable_data_ptr<T>());
  return output;
}

// The gradients by input, offset and mask; empty where not needed. With `deterministic`, that by the input is summed in
// fixed point; the others are summed in the same order in any case.
template <typename T, template <typename> class Geometry>
std::tuple<Tensor, Tensor, Tensor> roi_pool_backward(const RoiPoolSizes& s, const Geometry<Accumulate<T>>& geometry,
                                                     const Tensor& grad, const RoiPoolInputs& given,
                                                     const NeededRoiPoolGradients& need, bool deterministic) {
  const Tensor& input = given.input;
  const std::optional<Tensor>&offset = given.offset, &mask = given.mask;
  using A = Accumulate<T>;
  const DeviceScope device(input);
  const ScalarType dtype = input.scalar_type(), sum_dtype = accumulate_type(dtype);
  const bool launch = s.rois > 0 && s.channels > 0;
  const auto result = [&](const std::optional<Tensor>& like, bool needed) {
    if (!needed || !like) return empty_result(grad);
    // Where kernels run, they write all of it.
    return launch ? torch::stable::new_empty(*like, like->sizes()) : torch::stable::new_zeros(*like, like->sizes());
  };
  Tensor grad_offset = result(offset, need.offset), grad_mask = result(mask, need.offset);
  T* offset_data = need.offset && offset ? grad_offset.mutable_data_ptr<T>() : nullptr;
  T* mask_data = need.offset && mask ? grad_mask.mutable_data_ptr<T>() : nullptr;
  if (!launch) {
    Tensor zeros = empty_result(grad);
    if (need.input) {
      zeros = empty_4d(input, {s.batch, s.input_channels(), s.height, s.width}, dtype, is_channels_last(input));
      torch::stable::zero_(zeros);
    }
    return {zeros, grad_offset, grad_mask};
  }

  const RoiPoolOperandTensors<T> operands(s, given, device.stream());
  const Tensor grad_output = as_dense_as(grad, grad, dtype);
  const bool channels_last = is_channels_last(grad_output);
  const RoiPoolGradView<T> grad_values{grad_output.const_data_ptr<T>(), channels_last ? 1 : s.bins(),
                                       channels_last ? s.channels : 1};

  RoiPoolGradientsView<T> gradients{};
  Tensor sums = empty_result(grad), codes = sums, by_bin = sums;
  if (need.input) {
    // In the order of the images. Where that is the result's too, the sums are the result.
    sums = empty_4d(input, {s.batch, s.input_channels(), s.height, s.width},
                    deterministic ? ScalarType::Long : sum_dtype, true);
    torch::stable::zero_(sums);
    if (deterministic) {
      codes = torch::stable::new_zeros(input, {2}, ScalarType::Int);
      find_largest_exponent<T>(grad_output, codes.mutable_data_ptr<int>(), device.stream());
      if (mask) find_largest_exponent<T>(*operands.mask, codes.mutable_data_ptr<int>() + 1, device.stream());
      gradients.images.fixed = reinterpret_cast<unsigned long long*>(sums.mutable_data_ptr<int64_t>());
      gradients.codes = codes.const_data_ptr<int>();
      gradients.log2_terms = log2_ceil(s.rois * s.bins());  // a bin's weights add up to 1 at most
    } else {
      gradients.images.values = sums.mutable_data_ptr<A>();
    }
  }
  T* shared_offsets = geometry.own_offsets() ? nullptr : offset_data;
  T* shared_masks = s.channel_sets == 1 ? nullptr : mask_data;
  if (!shared_offsets) gradients.offsets = offset_data;
  if (!shared_masks) gradients.masks = mask_data;
  if (shared_offsets || shared_masks) {
    by_bin = torch::stable::new_empty(input, {s.rois * s.channel_sets * 3 * s.bins()}, sum_dtype);
    gradients.bins = by_bin.mutable_data_ptr<A>();
  }

  // Four values of the sums are what one instruction adds.
  constexpr int kVector = sizeof(T) == 8 ? 2 : 4;
  const auto kernel = operands.has_vectors(kVector) ? roi_pool_gradient_kernel<T, Geometry, kVector>
                                                    : roi_pool_gradient_kernel<T, Geometry, 1>;
  DCN_LAUNCH(kernel, roi_pool_blocks(s), kRoiThreads, device.stream(), operands.view, geometry, grad_values, gradients);
  if (shared_offsets || shared_masks) {
    const int64_t sums_of_bins = std::max(s.rois * s.channel_sets * 2 * s.offset_cells, s.rois * s.bins());
    const auto sum_bins = sum_bins_kernel<T, Geometry>;
    DCN_LAUNCH(sum_bins, std::min(divide_up(sums_of_bins, kRoiThreads), kMaxBlocks), kRoiThreads, device.stream(), s,
               geometry, by_bin.const_data_ptr<A>(), shared_offsets, shared_masks);
  }
  if (!need.input) return {empty_result(grad), grad_offset, grad_mask};
  if (deterministic) {
    const ReadFixed<A> read{gradients.images.fixed, gradients.codes, gradients.log2_terms};
    return {from_channels_last<T>(read, input, s.cells, device.stream()), grad_offset, grad_mask};
  }
  if (dtype == sum_dtype && s.cells == 1 && is_channels_last(input)) return {sums, grad_offset, grad_mask};
  return {from_channels_last<T>(ReadValues<A>{gradients.images.values}, input, s.cells, device.stream()), grad_offset,
          grad_mask};
}

// The operator whose bins Geometry finds, for every dtype.
template <template <typename> class Geometry, typename Sizes>
Tensor roi_pool(const Sizes& s, const RoiPoolInputs& given) {
  return in_dtype(given.input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    return roi_pool_forward<T, Geometry>(sizes_of(s), {s}, given);
  });
}

// Its gradients. `op` is the name of the backward operator.
template <template <typename> class Geometry, typename Sizes>
std::tuple<Tensor, Tensor, Tensor> roi_pool_gradients(const char* op, const Sizes& s, const Tensor& grad,
                                                      const RoiPoolInputs& given, const NeededRoiPoolGradients& need,
                                                      bool deterministic) {
  const RoiPoolSizes sizes = sizes_of(s);
  check_operand(op, "grad", grad, given.input, 4);
  check_shape(op, "grad", grad, {sizes.rois, sizes.channels, sizes.out_h, sizes.out_w});
  return in_dtype(given.input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    return roi_pool_backward<T, Geometry>(sizes, {s}, grad, given, need, deterministic);
  });
}

}  // namespace dcn::cuda
