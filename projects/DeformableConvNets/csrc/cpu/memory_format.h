// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Conversion between contiguous and channels_last tensors, on all threads: torch's own copy takes several times as
// long.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/memory.h"

namespace dcn::cpu {

// Pixels that a thread converts at a time.
constexpr int64_t kPixelsAtOnce = 64;

// Calls convert(image, first pixel, pixels) for all pixels of a batch.
template <typename Convert>
void for_each_pixel_range(int64_t batch, int64_t pixels, const Convert& convert) {
  const int64_t ranges = divide_up(pixels, kPixelsAtOnce);
  torch::stable::parallel_for(0, batch * ranges, 16, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % ranges * kPixelsAtOnce;
      convert(i / ranges, begin, std::min(kPixelsAtOnce, pixels - begin));
    }
  });
}

// As dense(tensor, dtype, ChannelsLast), where `transpose` is a kernel for values of that dtype.
template <typename Value>
Tensor to_channels_last(const Tensor& tensor, ScalarType dtype,
                        void (*transpose)(const Value*, int64_t, int64_t, int64_t, Value*, int64_t)) {
  if (tensor.scalar_type() != dtype || !tensor.is_contiguous()) return dense(tensor, dtype, MemoryFormat::ChannelsLast);
  const int64_t channels = tensor.size(1), pixels = tensor.size(2) * tensor.size(3);
  if (channels == 1 || pixels == 1) return tensor;  // both at once
  Tensor result = empty_4d(tensor, {tensor.size(0), channels, tensor.size(2), tensor.size(3)}, dtype, true);
  const auto* from = static_cast<const Value*>(tensor.const_data_ptr());
  auto* const to = static_cast<Value*>(result.mutable_data_ptr());
  for_each_pixel_range(tensor.size(0), pixels, [&](int64_t n, int64_t begin, int64_t count) {
    transpose(from + n * channels * pixels + begin, pixels, channels, count, to + (n * pixels + begin) * channels,
              channels);
  });
  return result;
}

template <typename T>
Tensor to_channels_last(const Tensor& tensor) {
  return to_channels_last(tensor, scalar_type_of<T>(), kernels<T>().transpose);
}

// A channels_last tensor as a contiguous one.
template <typename T>
Tensor to_contiguous(const Tensor& tensor) {
  const int64_t channels = tensor.size(1), pixels = tensor.size(2) * tensor.size(3);
  Tensor result =
      empty_4d(tensor, {tensor.size(0), channels, tensor.size(2), tensor.size(3)}, scalar_type_of<T>(), false);
  const T* from = tensor.const_data_ptr<T>();
  T* to = result.mutable_data_ptr<T>();
  for_each_pixel_range(tensor.size(0), pixels, [&](int64_t n, int64_t begin, int64_t count) {
    kernels<T>().transpose(from + (n * pixels + begin) * channels, channels, count, channels,
                           to + n * channels * pixels + begin, pixels);
  });
  return result;
}

// A gradient, contiguous or dense in channels_last, in the dtype and memory format of the tensor that it belongs to.
template <typename T>
Tensor like_input(const Tensor& gradient, const Tensor& input) {
  const bool channels_last = is_channels_last(input);
  const bool turned = !channels_last && is_channels_last(gradient);
  return as_result(turned ? to_contiguous<T>(gradient) : gradient, input.scalar_type(), channels_last);
}

}  // namespace dcn::cpu
