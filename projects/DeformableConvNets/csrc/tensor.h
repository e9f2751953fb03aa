// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Thin helpers over torch's stable ABI (2.10): checks that name the tensor and both values, and a few ATen calls.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
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

// Raises a RuntimeError in Python whose text is the parts, joined, and nothing else: what STD_TORCH_CHECK puts before
// it, the C++ function and the file on the machine that built the library, tells a user nothing.
template <typename... Parts>
[[noreturn]] void raise(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}
#define DCN_CHECK(condition, ...)                \
  do {                                           \
    if (!(condition)) ::dcn::raise(__VA_ARGS__); \
  } while (0)

// As torch prints it: "cpu", "cuda:1".
inline std::string to_string(const torch::stable::Device& device) {
  using torch::headeronly::DeviceType;
  const std::string type = device.type() == DeviceType::CPU    ? "cpu"
                           : device.type() == DeviceType::CUDA ? "cuda"
                           : device.type() == DeviceType::Meta
                               ? "meta"
                               : "device type " + std::to_string(static_cast<int>(device.type()));
  return device.index() < 0 || type == "cpu" ? type : type + ":" + std::to_string(device.index());
}

// As torch prints it: "torch.float32".
inline std::string to_string(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::ComplexHalf:
      return "torch.complex32";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    default: {  // the others have the same name in Python, in lower case
      std::string name = torch::headeronly::toString(dtype);
      for (char& letter : name) letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
      return "torch." + name;
    }
  }
}

inline bool is_half(ScalarType dtype) { return dtype == ScalarType::Half || dtype == ScalarType::BFloat16; }

inline void check_input_dtype(const char* op, const Tensor& input) {
  const ScalarType dtype = input.scalar_type();
  DCN_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float || is_half(dtype), op,
            ": input must be float64, float32, float16 or bfloat16, got ", to_string(dtype));
}

// Rank, dtype and device of one operand, against those of `like`.
inline void check_operand(const char* op, const char* name, const Tensor& tensor, const Tensor& like, int64_t rank) {
  DCN_CHECK(tensor.dim() == rank, op, ": ", name, " must have ", rank, " dimensions, got ", to_string(tensor.sizes()));
  DCN_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " has dtype ", to_string(tensor.scalar_type()),
            ", but input has ", to_string(like.scalar_type()));
  DCN_CHECK(tensor.device() == like.device(), op, ": ", name, " is on ", to_string(tensor.device()),
            ", but input is on ", to_string(like.device()));
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, const std::vector<int64_t>& expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) same = tensor.size(i) == expected[i];
  DCN_CHECK(same, op, ": ", name, " must have shape ", to_string(expected), ", got ", to_string(tensor.sizes()));
}

constexpr int64_t kMostOfSize = std::numeric_limits<int32_t>::max();

inline void check_least(const char* op, const char* name, const std::vector<int64_t>& values, int64_t least) {
  DCN_CHECK(values.size() == 2 && values[0] >= least && values[1] >= least, op, ": ", name,
            " must be two numbers of at least ", least, ", got ", to_string(values));
  // Products of two such numbers cannot overflow.
  DCN_CHECK(values[0] <= kMostOfSize && values[1] <= kMostOfSize, op, ": ", name, " must be two numbers of at most ",
            kMostOfSize, ", got ", to_string(values));
}

// RoIs (R, 5) for `input`. In half precision they could not name a pixel beyond 2048, so float32 RoIs go with half
// maps.
inline void check_rois(const char* op, const Tensor& rois, const Tensor& input) {
  const bool mixed = is_half(input.scalar_type()) && rois.scalar_type() == ScalarType::Float;
  check_operand(op, "rois", rois, mixed ? rois : input, 2);
  DCN_CHECK(rois.device() == input.device(), op, ": rois is on ", to_string(rois.device()), ", but input is on ",
            to_string(input.device()));
  DCN_CHECK(rois.size(1) == 5, op, ": rois must have shape [R, 5], got ", to_string(rois.sizes()));
}

// A tensor of the same values, in `dtype` and dense in `format`; the same tensor if it is so already.
inline Tensor dense(const Tensor& tensor, ScalarType dtype, MemoryFormat format = MemoryFormat::Contiguous) {
  const Tensor cast = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return torch::stable::contiguous(cast, format);
}

// The one rule of memory formats, which `is_channels_last` in dcn_d2/ops/_arguments.py repeats for tracing: whether
// what is computed from `tensor` is channels_last; else it is contiguous. It is where each pixel's channels lie side by
// side and pixels, rows and images follow each other, with gaps or without. The strides of dimensions of size 1 do not
// count, since compilers do not keep them; so a tensor of one channel or one pixel is contiguous.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.stride(1) != 1) return false;
  if (tensor.size(1) < 2 || tensor.size(2) * tensor.size(3) < 2) return false;
  int64_t least = tensor.size(1);
  for (const int dimension : {3, 2, 0}) {
    const int64_t size = tensor.size(dimension), stride = tensor.stride(dimension);
    if (size < 2) continue;
    if (stride < least) return false;  // as in an expanded tensor
    least = stride * size;
  }
  return true;
}

inline Tensor empty_4d(const Tensor& like, const std::array<int64_t, 4>& sizes, ScalarType dtype, bool channels_last) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Whether a tensor has the strides that empty_4d gives, also in dimensions of size 1.
inline bool has_strides_of_empty(const Tensor& tensor, bool channels_last) {
  int64_t expected = 1;
  for (const int dimension : channels_last ? std::array<int, 4>{1, 3, 2, 0} : std::array<int, 4>{3, 2, 1, 0}) {
    if (tensor.stride(dimension) != expected) return false;
    expected *= tensor.size(dimension);
  }
  return true;
}

// What a kernel computed, as an operator returns it: of that dtype, and with the strides that empty_4d gives. The same
// tensor if it is so already.
inline Tensor as_result(const Tensor& values, ScalarType dtype, bool channels_last) {
  if (values.scalar_type() == dtype && has_strides_of_empty(values, channels_last)) return values;
  Tensor result =
      empty_4d(values, {values.size(0), values.size(1), values.size(2), values.size(3)}, dtype, channels_last);
  torch::stable::copy_(result, values);
  return result;
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
