// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// What all CPU operators need: scratch memory, ranges, shares of the work for threads.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "tensor.h"

namespace dcn::cpu {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialised memory that starts on a cache line, so that vectors do not lie across two of them.
struct FreeScratch {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};
template <typename T>
using Scratch = std::unique_ptr<T[], FreeScratch>;

template <typename T>
Scratch<T> scratch(int64_t count) {
  return Scratch<T>(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64})));
}

template <typename T>
constexpr ScalarType scalar_type_of() {
  return sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
}

// The sum of the shares that threads have written, in their order.
inline Tensor sum_shares(const Tensor& shares, const Tensor& like) {
  const Tensor sum = shares.size(0) == 1 ? shares : torch::stable::sum(shares, std::array<int64_t, 1>{0});
  return torch::stable::reshape(sum, like.sizes());
}

// The numbers from `begin` on that are less than `end`.
struct Range {
  int64_t begin, end;
};
// Share `index` of [0, count), which is cut into `shares` ranges of nearly equal length.
inline Range share_of(int64_t count, int64_t shares, int64_t index) {
  return {count * index / shares, count * (index + 1) / shares};
}

}  // namespace dcn::cpu
