# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable models for Detectron2; importing this package registers them by name."""

from .backbone import (
    DeformBottleneckBlock,
    build_dcn_resnet_backbone,
    build_dcn_resnet_fpn_backbone,
    use_dcn_layers_in_detectron2,
)
from .norm import FixedStatsBatchNorm2d, fix_batch_norm_statistics

__all__ = [
    "DeformBottleneckBlock",
    "FixedStatsBatchNorm2d",
    "build_dcn_resnet_backbone",
    "build_dcn_resnet_fpn_backbone",
    "fix_batch_norm_statistics",
    "use_dcn_layers_in_detectron2",
]
