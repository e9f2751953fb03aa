// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The kernels for any processor: what the compiler makes of them without being told more.
#include <algorithm>
#include <utility>

#include "cpu/isa/kernels.h"

#define DCN_ISA baseline
#define DCN_VECTOR_BYTES 16
#define DCN_ROWS 4
#define DCN_PANEL_VECTORS 2
#include "cpu/isa/all_impl.h"
