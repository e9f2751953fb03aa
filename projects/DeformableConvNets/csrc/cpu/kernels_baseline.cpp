// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The kernels for any processor: what the compiler makes of them without being told more.
#include "kernels.h"

#define DCN_ISA baseline
#include "kernels_impl.h"
