// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The operator `cuda_architectures`: which GPU architectures the CUDA kernels were compiled for.
#include <sstream>
#include <string>

#include "tensor.h"

namespace dcn::cuda {
namespace {

// For example "8.0 9.0".
std::string cuda_architectures() {
  std::ostringstream names;
  for (const int number : {__CUDA_ARCH_LIST__}) {  // as 800,900: nvcc defines it, the same for every file
    names << (names.tellp() > 0 ? " " : "") << number / 100 << '.' << number / 10 % 10;
  }
  return names.str();
}

}  // namespace
}  // namespace dcn::cuda

STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&dcn::cuda::cuda_architectures));
}
