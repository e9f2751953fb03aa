// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The path of deform_conv2d on CPU for many small groups (ResNeXt, depthwise): see grouped_impl.h.
#pragma once

#include "cpu/deform_conv2d/gradients.h"
#include "cpu/deform_conv2d/operands.h"

namespace dcn::cpu {

// Whether the groups are of a kind that the grouped path handles.
template <typename T>
bool uses_grouped_path(const DeformConv2dSizes& s);

template <typename T>
Tensor grouped_forward(const DeformConv2dSizes& s, const Tensor& input, const SamplingInputs& sampling,
                       const Tensor& weight, const std::optional<Tensor>& bias);

// Gradients in the dtype of the computation: input, offset, weight, mask; empty where not needed.
template <typename T>
std::array<Tensor, 4> grouped_backward(const DeformConv2dSizes& s, const Tensor& grad, const Tensor& input,
                                       const SamplingInputs& sampling, const Tensor& weight,
                                       const NeededGradients& need);

}  // namespace dcn::cpu
