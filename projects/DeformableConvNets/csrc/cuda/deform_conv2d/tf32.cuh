// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Whether float32 operands may be rounded to TF32, for the entry points, whose last argument it is.
#pragma once

#include "tensor.h"

namespace dcn::cuda {

// The operator `_allows_tf32` says it: torch's stable ABI has no function that reads the setting. Python answers with
// torch's setting, and without Python the answer is torch's default (schemas.cpp).
inline bool allows_tf32() {
  std::array<StableIValue, 1> stack{};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("dcn_d2::_allows_tf32", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

// A boxed entry point, called with the answer after the operator's own arguments.
template <void (*kEntryPoint)(StableIValue*, uint64_t, uint64_t)>
void with_tf32_setting(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  std::vector<StableIValue> values(stack, stack + inputs);
  values.push_back(torch::stable::detail::from(allows_tf32()));
  kEntryPoint(values.data(), inputs + 1, outputs);
  std::copy_n(values.begin(), outputs, stack);
}

}  // namespace dcn::cuda
