// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set once, from the processor and DCN_CPU_CAPABILITY.
#include <cstdlib>
#include <string>

#include "kernels.h"

namespace dcn::cpu {
namespace {

enum class Capability { kDefault, kAvx2, kAvx512 };

Capability best_of_processor() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Capability::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Capability::kAvx2;
#endif
  return Capability::kDefault;
}

Capability choose() {
  const Capability best = best_of_processor();
  const char* variable = std::getenv("DCN_CPU_CAPABILITY");
  if (!variable) return best;
  const std::string cap = variable;
  STD_TORCH_CHECK(cap == "default" || cap == "avx2" || cap == "avx512",
                  "DCN_CPU_CAPABILITY must be default, avx2 or avx512, got ", cap);
  const Capability most = cap == "default" ? Capability::kDefault
                          : cap == "avx2"  ? Capability::kAvx2
                                           : Capability::kAvx512;
  return most < best ? most : best;
}

Capability chosen() {
  static const Capability value = choose();
  return value;
}

}  // namespace

#if defined(__x86_64__)
#define DCN_CHOOSE(kernels_of_type)                         \
  chosen() == Capability::kAvx512 ? avx512::kernels_of_type \
  : chosen() == Capability::kAvx2 ? avx2::kernels_of_type   \
                                  : baseline::kernels_of_type
#else
#define DCN_CHOOSE(kernels_of_type) baseline::kernels_of_type
#endif

template <>
const Kernels<float>& kernels<float>() {
  return DCN_CHOOSE(float_kernels);
}

template <>
const Kernels<double>& kernels<double>() {
  return DCN_CHOOSE(double_kernels);
}

}  // namespace dcn::cpu
