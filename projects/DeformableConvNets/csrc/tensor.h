// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Thin helpers over torch's stable ABI (2.10): checks that name the tensor and both values, and a few ATen calls.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

// Headers of torch 2.10 and 2.11 have only the check without the error's message. Can go with their support.
#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace dcn {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// "[2, 3, 4]"
template <typename Sizes>
std::string to_string(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}

inline bool is_half(ScalarType dtype) { return dtype == ScalarType::Half || dtype == ScalarType::BFloat16; }

inline void check_input_dtype(const char* op, const Tensor& input) {
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float || is_half(dtype), op,
                  ": input must be float64, float32, float16 or bfloat16, got ", torch::headeronly::toString(dtype));
}

// Rank, dtype and device of one operand, against those of `like`.
inline void check_operand(const char* op, const char* name, const Tensor& tensor, const Tensor& like, int64_t rank) {
  STD_TORCH_CHECK(tensor.dim() == rank, op, ": ", name, " must have ", rank, " dimensions, got ",
                  to_string(tensor.sizes()));
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), ", but input has ",
                  torch::headeronly::toString(like.scalar_type()));
  STD_TORCH_CHECK(tensor.device() == like.device(), op, ": ", name, " is on another device than input (index ",
                  static_cast<int>(tensor.device().index()), ", type ", static_cast<int>(tensor.device().type()),
                  " against index ", static_cast<int>(like.device().index()), ", type ",
                  static_cast<int>(like.device().type()), ")");
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, const std::vector<int64_t>& expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) same = tensor.size(i) == expected[i];
  STD_TORCH_CHECK(same, op, ": ", name, " must have shape ", to_string(expected), ", got ", to_string(tensor.sizes()));
}

constexpr int64_t kMostOfSize = std::numeric_limits<int32_t>::max();

inline void check_least(const char* op, const char* name, const std::vector<int64_t>& values, int64_t least) {
  STD_TORCH_CHECK(values.size() == 2 && values[0] >= least && values[1] >= least, op, ": ", name,
                  " must be two numbers of at least ", least, ", got ", to_string(values));
  // Products of two such numbers cannot overflow.
  STD_TORCH_CHECK(values[0] <= kMostOfSize && values[1] <= kMostOfSize, op, ": ", name,
                  " must be two numbers of at most ", kMostOfSize, ", got ", to_string(values));
}

// RoIs (R, 5) for `input`. In half precision they could not name a pixel beyond 2048, so float32 RoIs go with half
// maps.
inline void check_rois(const char* op, const Tensor& rois, const Tensor& input) {
  const bool mixed = is_half(input.scalar_type()) && rois.scalar_type() == ScalarType::Float;
  check_operand(op, "rois", rois, mixed ? rois : input, 2);
  STD_TORCH_CHECK(rois.device() == input.device(), op, ": rois is on another device than input");
  STD_TORCH_CHECK(rois.size(1) == 5, op, ": rois must have shape [R, 5], got ", to_string(rois.sizes()));
}

// A tensor of the same values, in `dtype` and dense in `format`; the same tensor if it is so already.
inline Tensor dense(const Tensor& tensor, ScalarType dtype, MemoryFormat format = MemoryFormat::Contiguous) {
  const Tensor cast = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return torch::stable::contiguous(cast, format);
}

// Whether a 4-d tensor is channels_last and not also contiguous.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.is_contiguous()) return false;
  const int64_t channels = tensor.size(1), height = tensor.size(2), width = tensor.size(3);
  return tensor.stride(1) == 1 && (width == 1 || tensor.stride(3) == channels) &&
         (height == 1 || tensor.stride(2) == width * channels) &&
         (tensor.size(0) == 1 || tensor.stride(0) == height * width * channels);
}

inline Tensor empty_4d(const Tensor& like, const std::array<int64_t, 4>& sizes, ScalarType dtype, bool channels_last) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Sums of 32-bit integers up to each of them, in 32 bits.
inline Tensor cumulative_sum(const Tensor& counts) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(counts), torch::stable::detail::from(int64_t{0}),
                                    torch::stable::detail::from(std::optional<ScalarType>(ScalarType::Int))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The dtype in which `dtype` is accumulated.
inline ScalarType accumulate_type(ScalarType dtype) { return is_half(dtype) ? ScalarType::Float : dtype; }

inline Tensor empty_result(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

}  // namespace dcn
