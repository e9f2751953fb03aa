# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable models for Detectron2; importing this package registers them by name.

What is about deformable layers lies here. The rules of MMDetection that are not lie in `mmdet`.
"""

from .backbone import (
    DeformBottleneckBlock,
    build_dcn_resnet_backbone,
    build_dcn_resnet_fpn_backbone,
    build_dcn_retinanet_resnet_fpn_backbone,
    use_dcn_layers_in_detectron2,
)
from .flops import register_flop_handles
from .mmdet import DCNRPN, FixedStatsBatchNorm2d, MaskHeadPerStage, MinimumIoUMatcher, fix_batch_norm_statistics
from .poolers import ROI_POOLER_REGISTRY, DCNROIPooler, assign_levels, build_roi_pooler, pool_rois
from .roi_heads import DCNCascadeROIHeads, DCNROIHeads

__all__ = [
    "DCNCascadeROIHeads",
    "DCNROIHeads",
    "DCNROIPooler",
    "DCNRPN",
    "DeformBottleneckBlock",
    "FixedStatsBatchNorm2d",
    "MaskHeadPerStage",
    "MinimumIoUMatcher",
    "ROI_POOLER_REGISTRY",
    "assign_levels",
    "build_dcn_resnet_backbone",
    "build_dcn_resnet_fpn_backbone",
    "build_dcn_retinanet_resnet_fpn_backbone",
    "build_roi_pooler",
    "fix_batch_norm_statistics",
    "pool_rois",
    "use_dcn_layers_in_detectron2",
]

register_flop_handles()
