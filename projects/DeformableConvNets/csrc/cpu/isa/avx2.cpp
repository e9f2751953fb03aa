// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The kernels for x86-64 processors with AVX2 and FMA. Headers come before the target is set: what they define must
// stay fit for every processor.
#if defined(__x86_64__)
#include <algorithm>
#include <utility>

#include "cpu/isa/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define DCN_ISA avx2
#define DCN_VECTOR_BYTES 32
#define DCN_ROWS 6
#define DCN_PANEL_VECTORS 2
#include "cpu/isa/all_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
