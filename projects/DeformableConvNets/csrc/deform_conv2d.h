// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Operands of deform_conv2d: sizes and checks that the CPU and the CUDA entry points share.
#pragma once

#include <limits>

#include "sample.h"
#include "tensor.h"

namespace dcn {

// input (batch, channels, height, width), offset (batch, deform_groups * taps * 2, out_h, out_w),
// weight (out_channels, channels / groups, kernel_h, kernel_w), mask (batch, deform_groups * taps, out_h, out_w),
// output (batch, out_channels, out_h, out_w).
struct DeformConv2dSizes {
  int64_t batch, channels, height, width;
  int64_t out_channels, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups, deform_groups;

  DCN_HOST_DEVICE int64_t taps() const { return kernel_h * kernel_w; }
  DCN_HOST_DEVICE int64_t positions() const { return out_h * out_w; }  // of one image
  DCN_HOST_DEVICE int64_t pixels() const { return height * width; }    // of one image
  DCN_HOST_DEVICE int64_t group_channels() const { return channels / groups; }
  DCN_HOST_DEVICE int64_t group_out_channels() const { return out_channels / groups; }
  DCN_HOST_DEVICE int64_t deform_channels() const { return channels / deform_groups; }
};

// Where tap (i, j) of output (h, w) reads, in input pixels, before its offset is added.
template <typename T>
DCN_HOST_DEVICE T tap_y(const DeformConv2dSizes& s, int64_t h, int64_t i) {
  return static_cast<T>(h * s.stride_h - s.pad_h + i * s.dilation_h);
}
template <typename T>
DCN_HOST_DEVICE T tap_x(const DeformConv2dSizes& s, int64_t w, int64_t j) {
  return static_cast<T>(w * s.stride_w - s.pad_w + j * s.dilation_w);
}

// Which gradients the caller asked for.
struct NeededGradients {
  bool input, offset, weight;  // the mask's comes with the offset's
};

inline int64_t conv_output_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t span = size + 2 * pad - dilation * (kernel - 1) - 1;
  return span < 0 ? 0 : span / stride + 1;
}

// What says where a call samples, and by how much each sample counts. The planes of `offset` are (deform_groups, taps,
// 2), those of `mask` (deform_groups, taps).
struct SamplingInputs {
  Tensor offset;
  std::optional<Tensor> mask;
  // The output of an offset branch, if the caller gave one. Then `offset` and `mask` are views of it, and `mask` holds
  // logits: a sample counts by their sigmoid.
  std::optional<Tensor> branch_output;
};

// Whether there is a mask that gets a gradient of its own.
inline bool has_own_mask(const SamplingInputs& sampling) { return sampling.mask && !sampling.branch_output; }

// Splits the output of an offset branch into offsets and logits. Its channels must be a multiple of three times the
// taps of `weight`.
inline SamplingInputs split_branch_output(Tensor offset_and_mask, const Tensor& weight) {
  const char* op = "modulated_deform_conv2d";
  check_operand(op, "weight", weight, weight, 4);
  check_operand(op, "offset_and_mask", offset_and_mask, offset_and_mask, 4);
  const int64_t taps = weight.size(2) * weight.size(3), channels = offset_and_mask.size(1);
  DCN_CHECK(taps > 0 && channels > 0 && channels % (3 * taps) == 0, op, ": offset_and_mask has ", channels,
            " channels, but needs a multiple of 3 * ", weight.size(2), " * ", weight.size(3), " = ", 3 * taps);
  const int64_t logits = channels / 3;
  return {torch::stable::narrow(offset_and_mask, 1, 0, 2 * logits),
          torch::stable::narrow(offset_and_mask, 1, 2 * logits, logits), offset_and_mask};
}

// Raises an error that names the operand and both values where something does not fit. With `float_positions`, offsets
// and mask may be float32 where the input is of half precision: rounded to it, they move samples by up to 1/256 of
// their own size, and over the pixels' borders, where gradients jump.
inline DeformConv2dSizes check_deform_conv2d(const Tensor& input, const SamplingInputs& sampling, const Tensor& weight,
                                             const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                                             const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                             bool float_positions = false) {
  const auto check_positions = [&](const char* op, const char* name, const Tensor& tensor) {
    const bool mixed = float_positions && is_half(input.scalar_type()) && tensor.scalar_type() == ScalarType::Float;
    check_operand(op, name, tensor, mixed ? tensor : input, 4);
    DCN_CHECK(tensor.device() == input.device(), op, ": ", name, " is on ", to_string(tensor.device()),
              ", but input is on ", to_string(input.device()));
  };
  // What the caller gave: offsets, or the output of an offset branch.
  const bool branch = sampling.branch_output.has_value();
  const char* op = branch ? "modulated_deform_conv2d" : "deform_conv2d";
  const char* offset_name = branch ? "offset_and_mask" : "offset";
  const Tensor& offset = branch ? *sampling.branch_output : sampling.offset;
  const int64_t per_tap = branch ? 3 : 2;
  check_input_dtype(op, input);
  check_operand(op, "input", input, input, 4);
  check_positions(op, offset_name, offset);
  check_operand(op, "weight", weight, input, 4);
  check_least(op, "stride", stride, 1);
  check_least(op, "padding", padding, 0);
  check_least(op, "dilation", dilation, 1);

  DeformConv2dSizes s{};
  s.batch = input.size(0), s.channels = input.size(1), s.height = input.size(2), s.width = input.size(3);
  s.out_channels = weight.size(0), s.kernel_h = weight.size(2), s.kernel_w = weight.size(3);
  s.stride_h = stride[0], s.stride_w = stride[1], s.pad_h = padding[0], s.pad_w = padding[1];
  s.dilation_h = dilation[0], s.dilation_w = dilation[1];
  const int64_t taps = s.taps();
  DCN_CHECK(taps > 0, op, ": weight has an empty kernel, ", s.kernel_h, " x ", s.kernel_w);
  DCN_CHECK(weight.size(1) > 0 && s.channels % weight.size(1) == 0, op, ": input has ", s.channels,
            " channels, but needs a multiple of weight's ", weight.size(1));
  s.groups = s.channels / weight.size(1);
  DCN_CHECK(s.groups > 0 && s.out_channels % s.groups == 0, op, ": weight has ", s.out_channels,
            " output channels, but needs a multiple of the ", s.groups, " groups");
  s.deform_groups = offset.size(1) / (per_tap * taps);
  DCN_CHECK(s.deform_groups > 0 && offset.size(1) % (per_tap * taps) == 0, op, ": ", offset_name, " has ",
            offset.size(1), " channels, but needs a multiple of ", per_tap, " * ", s.kernel_h, " * ", s.kernel_w, " = ",
            per_tap * taps);
  DCN_CHECK(s.channels % s.deform_groups == 0, op, ": input has ", s.channels, " channels, but needs a multiple of ",
            offset_name, "'s ", s.deform_groups, " groups");
  s.out_h = conv_output_size(s.height, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h);
  s.out_w = conv_output_size(s.width, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w);
  DCN_CHECK(s.out_h > 0 && s.out_w > 0, op, ": input of ", s.height, " x ", s.width,
            " is too small for weight's kernel: the output would be ", s.out_h, " x ", s.out_w);
  DCN_CHECK(s.pixels() <= std::numeric_limits<int32_t>::max(), op, ": input of ", s.height, " x ", s.width,
            " has more pixels in an image than ", std::numeric_limits<int32_t>::max());
  check_shape(op, offset_name, offset, {s.batch, offset.size(1), s.out_h, s.out_w});
  if (has_own_mask(sampling)) {
    check_positions(op, "mask", *sampling.mask);
    check_shape(op, "mask", *sampling.mask, {s.batch, s.deform_groups * taps, s.out_h, s.out_w});
  }
  if (bias) {
    check_operand(op, "bias", *bias, input, 1);
    check_shape(op, "bias", *bias, {s.out_channels});
  }
  return s;
}

}  // namespace dcn
