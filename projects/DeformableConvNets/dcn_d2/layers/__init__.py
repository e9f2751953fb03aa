# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable layers: modules with parameters, which need torch and `dcn_d2.ops` only."""

from ..ops import split_offset_and_mask
from .deform_conv import DeformConv, DeformConvPack, ModulatedDeformConv, ModulatedDeformConvPack
from .deform_psroi_pool import DeformPSRoIPool, ModulatedDeformPSRoIPool
from .deform_roi_pool import DeformRoIPool, ModulatedDeformRoIPool

__all__ = [
    "DeformConv",
    "DeformConvPack",
    "DeformPSRoIPool",
    "DeformRoIPool",
    "ModulatedDeformConv",
    "ModulatedDeformConvPack",
    "ModulatedDeformPSRoIPool",
    "ModulatedDeformRoIPool",
    "split_offset_and_mask",
]
