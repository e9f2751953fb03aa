// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Where the backward pass of deform_conv2d on CPU puts its results.
#pragma once

#include "cpu/deform_conv2d/operands.h"

namespace dcn::cpu {

// Where a backward task adds its results. Null where a gradient is not needed.
template <typename T>
struct GradientsView {
  T* input;                        // (batch, pixels, channels)
  T* offset;                       // (deform_groups, taps, 2, positions) for every image
  T* mask;                         // (deform_groups, taps, positions) for every image
  int64_t offset_size, mask_size;  // from one image to the next
  bool logits;                     // the mask's gradient is by its logits
  WeightView<T> weight;

  // Adds what follows from the dots of a tap, for positions from `begin` on of image n.
  void add_to_offsets(const DeformConv2dSizes& s, int64_t n, int64_t deform_group, int64_t tap, int64_t begin,
                      const TapSamples<T>& samples, const T* const* dots) const {
    const int64_t plane = deform_group * s.taps() + tap;
    T* y = offset + n * offset_size + 2 * plane * s.positions() + begin;
    kernels<T>().add_offset_gradients(samples, dots, y, y + s.positions(),
                                      mask ? mask + n * mask_size + plane * s.positions() + begin : nullptr, logits);
  }
};

// The tensors behind GradientsView, zero at first. The work is cut into `image_shares` of the images times
// `channel_shares` of the channels: each share of the channels has offset gradients of its own, and each share of the
// images has weight gradients of its own. They are added up at the end.
template <typename T>
class GradientTensors {
 public:
  GradientTensors(const DeformConv2dSizes& s, const Tensor& input, const SamplingInputs& sampling, const Tensor& weight,
                  const NeededGradients& need, int64_t image_shares, int64_t channel_shares)
      : input_(input),
        sampling_(sampling),
        weight_(weight),
        need_(need),
        grad_input_(empty_4d(input, {s.batch, s.channels, s.height, s.width}, scalar_type_of<T>(), true)),
        grad_offset_(zeros(need.offset ? channel_shares : 0, sampling.branch_output.value_or(sampling.offset).numel())),
        grad_mask_(zeros(has_own_mask() ? channel_shares : 0, has_own_mask() ? sampling.mask->numel() : 0)),
        // The tasks write all of it, unless there are none.
        grad_weight_(s.batch > 0 && s.out_channels > 0 ? empty(need.weight ? image_shares : 0, weight.numel())
                                                       : zeros(need.weight ? image_shares : 0, weight.numel())) {
    if (need.input) torch::stable::zero_(grad_input_);
    const int64_t plane_pairs = s.deform_groups * s.taps() * s.positions();
    offset_size_ = plane_pairs * (sampling.branch_output ? 3 : 2);
    mask_size_ = plane_pairs * (sampling.branch_output ? 3 : 1);
  }

  GradientsView<T> of(int64_t image_share, int64_t channel_share) {
    GradientsView<T> view{};
    view.offset_size = offset_size_, view.mask_size = mask_size_, view.logits = sampling_.branch_output.has_value();
    if (need_.input) view.input = grad_input_.template mutable_data_ptr<T>();
    if (need_.offset) view.offset = share_in(grad_offset_, channel_share);
    if (need_.offset && view.logits) view.mask = view.offset + offset_size_ / 3 * 2;
    if (has_own_mask()) view.mask = share_in(grad_mask_, channel_share);
    if (need_.weight) view.weight = {share_in(grad_weight_, image_share), is_channels_last(weight_)};
    return view;
  }

  // Input, offset (or the branch's output), weight, mask, in the dtype of the computation; empty where not needed.
  std::array<Tensor, 4> finish() const {
    const Tensor none = empty_result(input_);
    return {need_.input ? like_input<T>(grad_input_, input_) : none, need_.offset ? offset_gradient() : none,
            need_.weight ? weight_gradient() : none, has_own_mask() ? sum_shares(grad_mask_, *sampling_.mask) : none};
  }

 private:
  bool has_own_mask() const { return need_.offset && dcn::has_own_mask(sampling_); }
  Tensor weight_gradient() const {
    const Tensor sum = sum_shares(grad_weight_, weight_);
    if (!is_channels_last(weight_)) return sum;
    const int64_t kernel_h = weight_.size(2), kernel_w = weight_.size(3);
    const Tensor values = torch::stable::reshape(sum, {weight_.size(0), kernel_h, kernel_w, weight_.size(1)});
    return torch::stable::transpose(torch::stable::transpose(values, 1, 3), 2, 3);
  }
  Tensor offset_gradient() const {
    if (!sampling_.branch_output) return sum_shares(grad_offset_, sampling_.offset);
    return like_input<T>(sum_shares(grad_offset_, *sampling_.branch_output), *sampling_.branch_output);
  }
  Tensor zeros(int64_t shares, int64_t count) const {
    return torch::stable::new_zeros(input_, {shares, count}, scalar_type_of<T>());
  }
  Tensor empty(int64_t shares, int64_t count) const {
    return torch::stable::new_empty(input_, {shares, count}, scalar_type_of<T>());
  }
  static T* share_in(Tensor& shares, int64_t index) {
    return shares.template mutable_data_ptr<T>() + index * shares.size(1);
  }

  const Tensor& input_;
  const SamplingInputs& sampling_;
  const Tensor& weight_;
  NeededGradients need_;
  Tensor grad_input_, grad_offset_, grad_mask_, grad_weight_;
  int64_t offset_size_, mask_size_;
};

}  // namespace dcn::cpu
