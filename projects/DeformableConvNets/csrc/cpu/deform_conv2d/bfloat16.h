// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The path of deform_conv2d on CPU for bfloat16 on processors with matrix tiles: samples and weights are multiplied as
// bfloat16, sums are float32, and no tensor is copied to float32. Elsewhere bfloat16 is computed as float32.
#pragma once

#include "cpu/deform_conv2d/gradients.h"
#include "cpu/deform_conv2d/operands.h"

namespace dcn::cpu {

// Whether the call is of a kind that this path handles, on a processor that has it.
bool uses_bfloat16_path(const DeformConv2dSizes& s, ScalarType dtype);

Tensor bfloat16_forward(const DeformConv2dSizes& s, const Tensor& input, const SamplingInputs& sampling,
                        const Tensor& weight, const std::optional<Tensor>& bias);

// Gradients in any dtype: input, offset (or the branch's output), weight, mask; empty where not needed.
std::array<Tensor, 4> bfloat16_backward(const DeformConv2dSizes& s, const Tensor& grad, const Tensor& input,
                                        const SamplingInputs& sampling, const Tensor& weight,
                                        const NeededGradients& need);

}  // namespace dcn::cpu
