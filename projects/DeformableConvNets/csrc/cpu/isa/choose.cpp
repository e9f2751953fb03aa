// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set once, from the processor and DCN_CPU_CAPABILITY.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <string>

#include "cpu/isa/amx_kernels.h"
#include "cpu/isa/kernels.h"

#if defined(DCN_WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dcn::cpu {
namespace {

enum class Capability { kDefault, kAvx2, kAvx512, kAmx };
// Their names in DCN_CPU_CAPABILITY, in the same order.
constexpr std::array<const char*, 4> kNames{"default", "avx2", "avx512", "amx"};

// Matrix tiles are there if the processor has them and the operating system lets this process use them, which it must
// be asked for once.
bool may_use_amx() {
#if defined(DCN_WITH_AMX)
  constexpr unsigned kTile = 1U << 24, kBfloat16 = 1U << 22, kVectorBfloat16 = 1U << 5;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kBfloat16) == 0) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & kVectorBfloat16) == 0) return false;
  constexpr unsigned kSavesState = 1U << 27;  // without it there is no xgetbv
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kSavesState) == 0) return false;
  unsigned state = 0, upper = 0;
  __asm__("xgetbv" : "=a"(state), "=d"(upper) : "c"(0));
  constexpr unsigned kTileState = 3U << 17;
  if ((state & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Capability best_of_processor() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return may_use_amx() ? Capability::kAmx : Capability::kAvx512;
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
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (cap == kNames[i]) return std::min(static_cast<Capability>(i), best);
  }
  DCN_CHECK(false, "DCN_CPU_CAPABILITY must be default, avx2, avx512 or amx, got ", cap);
  return best;  // not reached, which not all compilers see
}

Capability chosen() {
  static const Capability value = choose();
  return value;
}

// The operator `capability`: which instruction set the kernels use. "amx" has the kernels of "avx512", and matrix tiles
// for bfloat16.
std::string capability() { return kNames[static_cast<size_t>(chosen())]; }

}  // namespace

#if defined(__x86_64__)
#define DCN_CHOOSE(kernels_of_type)                         \
  chosen() >= Capability::kAvx512 ? avx512::kernels_of_type \
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

const AmxKernels* amx_kernels() {
#if defined(DCN_WITH_AMX)
  if (chosen() == Capability::kAmx) return &amx::kernels;
#endif
  return nullptr;
}

}  // namespace dcn::cpu

STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&dcn::cpu::capability));
}
