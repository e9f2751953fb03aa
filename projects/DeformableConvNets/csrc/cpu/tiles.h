// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// What the tiled CPU operators share: scratch memory, matrix views for torch's matmul, ranges.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <memory>

#include "tensor.h"

namespace dcn::cpu {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialised memory of a thread.
template <typename T>
std::unique_ptr<T[]> scratch(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}

template <typename T>
constexpr ScalarType scalar_type_of() {
  return sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
}

// A view of memory as a matrix for matmul_out; it does not own the memory.
template <typename T>
Tensor matrix(const T* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  const std::array<int64_t, 2> sizes{rows, columns}, strides{row_stride, column_stride};
  return torch::stable::from_blob(const_cast<T*>(data), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), scalar_type_of<T>());
}

// out = a @ b, or out += a @ b; one thread's work inside a parallel_for.
inline void matmul_out(const Tensor& a, const Tensor& b, const Tensor& out, bool add) {
  if (add) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

// Part `index` of [0, count) cut into `parts` ranges of nearly equal length.
struct Range {
  int64_t begin, end;
};
inline Range part_of(int64_t count, int64_t parts, int64_t index) {
  return {count * index / parts, count * (index + 1) / parts};
}

}  // namespace dcn::cpu
