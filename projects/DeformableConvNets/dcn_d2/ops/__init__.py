# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable operators for CPU and CUDA, also as `torch.ops.dcn_d2.*`. Needs torch only."""

import torch

from . import flops
from .batched_nms import batched_nms
from .deform_conv2d import deform_conv2d
from .deform_psroi_pool import deform_psroi_pool
from .deform_roi_pool import deform_roi_pool
from .modulated_deform_conv2d import modulated_deform_conv2d, split_offset_and_mask
from .portable import portable_operators

__all__ = [
    "batched_nms",
    "deform_conv2d",
    "deform_psroi_pool",
    "deform_roi_pool",
    "modulated_deform_conv2d",
    "portable_operators",
    "split_offset_and_mask",
]

# Each has kernels of its name, and of that of its gradients, in torch.ops.dcn_d2.
OPERATORS = (deform_conv2d, deform_psroi_pool, deform_roi_pool, modulated_deform_conv2d)

flops.register_formulas()
# torch.jit.script cannot read these functions, but may call the operators of the same arguments in their place.
for _operator in (*OPERATORS, batched_nms):
    torch.jit._builtins._register_builtin(_operator, f"dcn_d2::{_operator.__name__}")
