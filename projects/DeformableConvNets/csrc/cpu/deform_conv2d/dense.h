// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The path of deform_conv2d on CPU for all convolutions that no other path handles: matrix products.
#pragma once

#include "cpu/deform_conv2d/gradients.h"
#include "cpu/deform_conv2d/operands.h"

namespace dcn::cpu {

// Limits of a tile of output positions. Its columns stay in the second-level cache; so does a segment's weight gradient
// in the backward pass. A tile of more positions reads the packed weight less often.
struct TileLimits {
  int64_t column_bytes, positions;
};

// Positions of a tile whose columns have `bytes` per position, if `workers` threads share `positions`.
template <typename T>
int64_t tile_size(TileLimits most, int64_t bytes, int64_t positions, int64_t workers) {
  const int64_t rows = kernels<T>().rows;
  const int64_t fitting = std::min({most.column_bytes / bytes, most.positions, divide_up(positions, workers)});
  return std::max<int64_t>(divide_up(fitting, rows) * rows, rows);
}

template <typename T>
Tensor dense_forward(const DeformConv2dSizes& s, const Tensor& input, const SamplingInputs& sampling,
                     const Tensor& weight, const std::optional<Tensor>& bias);

// Gradients in the dtype of the computation: input, offset, weight, mask; empty where not needed.
template <typename T>
std::array<Tensor, 4> dense_backward(const DeformConv2dSizes& s, const Tensor& grad, const Tensor& input,
                                     const SamplingInputs& sampling, const Tensor& weight, const NeededGradients& need);

}  // namespace dcn::cpu
