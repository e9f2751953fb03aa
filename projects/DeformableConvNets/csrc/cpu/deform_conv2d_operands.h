// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// What the paths of deform_conv2d on CPU share: its operands, and where the backward pass puts its results.
#pragma once

#include <utility>
#include <vector>

#include "kernels.h"
#include "layout.h"
#include "tiles.h"

namespace dcn::cpu {

// The tensors of one call, dense, in the dtype of the computation.
template <typename T>
struct Operands {
  Tensor image_tensor, offset_tensor, weight_tensor;
  std::optional<Tensor> mask_tensor;
  DeformConv2dSizes sizes;
  const T *images, *offsets, *masks, *weights;
  std::vector<T> zeros;

  Operands(const DeformConv2dSizes& s, const Tensor& input, const Tensor& offset, const Tensor& weight,
           const std::optional<Tensor>& mask)
      : image_tensor(to_channels_last<T>(input)),
        offset_tensor(dense(offset, scalar_type_of<T>())),
        weight_tensor(dense(weight, scalar_type_of<T>())),
        sizes(s),
        zeros(s.channels, T(0)) {
    if (mask) mask_tensor = dense(*mask, scalar_type_of<T>());
    images = image_tensor.template const_data_ptr<T>();
    offsets = offset_tensor.template const_data_ptr<T>();
    weights = weight_tensor.template const_data_ptr<T>();
    masks = mask_tensor ? mask_tensor->template const_data_ptr<T>() : nullptr;
  }

  int64_t image_begin(int64_t n) const { return n * sizes.pixels() * sizes.channels; }
  int64_t offset_begin(int64_t n) const { return n * sizes.deform_groups * sizes.taps() * 2 * sizes.positions(); }
  const T* mask(int64_t n) const { return masks ? masks + offset_begin(n) / 2 : nullptr; }
  ImageChannels<T> channels(int64_t n, int64_t begin, int64_t count) const {
    return {images + image_begin(n) + begin, sizes.channels, count, zeros.data()};
  }

  void locate(int64_t n, int64_t deform_group, int64_t tap, int64_t begin, const TapSamples<T>& samples) const {
    kernels<T>().locate(sizes, offsets + offset_begin(n), mask(n), deform_group, tap, begin, samples);
  }
};

// Where a backward task adds its results. Null where a gradient is not needed.
template <typename T>
struct Gradients {
  T* input;   // (batch, pixels, channels)
  T* offset;  // as offset
  T* mask;    // as mask
  T* weight;  // as weight
};

// The gradients that the caller asked for.
struct NeededGradients {
  bool input, offset, weight;  // the mask's comes with the offset's
};

// The tensors behind Gradients, zero at first. The work is cut into `image_parts` of the images times `channel_parts`
// of the channels: those that share an image have offset gradients of their own, those that share a channel have weight
// gradients of their own, which are summed at the end.
template <typename T>
class GradientTensors {
 public:
  GradientTensors(const DeformConv2dSizes& s, const Tensor& input, const Tensor& offset, const Tensor& weight,
                  const std::optional<Tensor>& mask, const NeededGradients& need, int64_t image_parts,
                  int64_t channel_parts)
      : input_(input),
        offset_(offset),
        weight_(weight),
        mask_(mask),
        need_(need),
        grad_input_(empty_4d(input, {s.batch, s.channels, s.height, s.width}, scalar_type_of<T>(), true)),
        grad_offset_(zeros(need.offset ? channel_parts : 0, offset.numel())),
        grad_mask_(zeros(need.offset && mask ? channel_parts : 0, mask ? mask->numel() : 0)),
        grad_weight_(zeros(need.weight ? image_parts : 0, weight.numel())) {
    if (need.input) torch::stable::zero_(grad_input_);
  }

  Gradients<T> of(int64_t image_part, int64_t channel_part) {
    Gradients<T> part{};
    if (need_.input) part.input = grad_input_.template mutable_data_ptr<T>();
    if (need_.offset) part.offset = part_of_tensor(grad_offset_, channel_part);
    if (need_.offset && mask_) part.mask = part_of_tensor(grad_mask_, channel_part);
    if (need_.weight) part.weight = part_of_tensor(grad_weight_, image_part);
    return part;
  }

  // Input, offset, weight, mask, in the dtype of the computation; empty where not needed.
  std::array<Tensor, 4> finish() const {
    const Tensor none = empty_result(input_);
    return {need_.input ? like_input<T>(grad_input_, input_) : none,
            need_.offset ? sum_parts(grad_offset_, offset_) : none,
            need_.weight ? sum_parts(grad_weight_, weight_) : none,
            need_.offset && mask_ ? sum_parts(grad_mask_, *mask_) : none};
  }

 private:
  Tensor zeros(int64_t parts, int64_t count) const {
    return torch::stable::new_zeros(input_, {parts, count}, scalar_type_of<T>());
  }
  static T* part_of_tensor(Tensor& parts, int64_t index) {
    return parts.template mutable_data_ptr<T>() + index * parts.size(1);
  }

  const Tensor &input_, &offset_, &weight_;
  const std::optional<Tensor>& mask_;
  NeededGradients need_;
  Tensor grad_input_, grad_offset_, grad_mask_, grad_weight_;
};

}  // namespace dcn::cpu
