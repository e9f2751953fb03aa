# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Detectron2's ROI heads with deformable RoI poolers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads

from ..config import with_dcn_keys
from ..config.checks import check_part
from .mmdet import MinimumIoUMatcher, MMDetCascadeROIHeads
from .poolers import ROI_POOLER_REGISTRY, build_roi_pooler


def _with_detectron2_pooler(cfg: CfgNode, head: str) -> CfgNode:
    """Copies `cfg`. If the POOLER_TYPE of `head` is one of dcn_d2's, the copy has one that Detectron2 can build."""
    copy = cfg.clone()
    copy.defrost()
    if copy.MODEL[head].POOLER_TYPE in ROI_POOLER_REGISTRY:
        copy.MODEL[head].POOLER_TYPE = "ROIAlignV2"
    return copy


def _with_own_pooler(
    arguments: dict[str, Any], kind: str, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]
) -> dict[str, Any]:
    """Replaces the pooler in the arguments that Detectron2 made for a head, if the head has a pooler.

    Args:
        arguments: of the constructor of the RoI heads; a copy is returned.
        kind: "box", "mask" or "keypoint".
        cfg: the config; POOLER_TYPE of the head's node says which pooler it gets.
        input_shape: channels and stride of each feature map, by its name.
    """
    if arguments.get(f"{kind}_pooler") is None:
        return arguments
    return arguments | {f"{kind}_pooler": build_roi_pooler(cfg, cfg.MODEL[f"ROI_{kind.upper()}_HEAD"], input_shape)}


@ROI_HEADS_REGISTRY.register()
class DCNROIHeads(StandardROIHeads):
    """Detectron2's `StandardROIHeads`, whose POOLER_TYPE may also be one of `ROI_POOLER_REGISTRY`.

    It reads MODEL.DCN.POOLER_FC_DIM, POOLER_MMDET_LEVELS and ROI_LOW_QUALITY_IOU. With their defaults and a POOLER_TYPE
    that Detectron2 knows it is `StandardROIHeads`.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Reads the keys of `StandardROIHeads` and those of MODEL.DCN."""
        cfg = with_dcn_keys(cfg)
        check_part(cfg, "MODEL.ROI_HEADS.NAME", cls.__name__)
        arguments = super().from_config(cfg, input_shape)
        heads, minimum = cfg.MODEL.ROI_HEADS, cfg.MODEL.DCN.ROI_LOW_QUALITY_IOU
        if minimum >= 0 and "proposal_matcher" in arguments:
            arguments["proposal_matcher"] = MinimumIoUMatcher(
                heads.IOU_THRESHOLDS, heads.IOU_LABELS, minimum, truth_appended=heads.PROPOSAL_APPEND_GT
            )
        return arguments

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_box_head(_with_detectron2_pooler(cfg, "ROI_BOX_HEAD"), input_shape)
        return _with_own_pooler(arguments, "box", cfg, input_shape)

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_mask_head(_with_detectron2_pooler(cfg, "ROI_MASK_HEAD"), input_shape)
        return _with_own_pooler(arguments, "mask", cfg, input_shape)

    @classmethod
    def _init_keypoint_head(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_keypoint_head(_with_detectron2_pooler(cfg, "ROI_KEYPOINT_HEAD"), input_shape)
        return _with_own_pooler(arguments, "keypoint", cfg, input_shape)


@ROI_HEADS_REGISTRY.register()
class DCNCascadeROIHeads(DCNROIHeads, MMDetCascadeROIHeads):
    """Detectron2's `CascadeROIHeads` with the poolers of `DCNROIHeads` and the rules of `MMDetCascadeROIHeads`.

    Reads the keys of both. With all of them at their defaults it is `CascadeROIHeads`. Arguments as for
    `MMDetCascadeROIHeads`.
    """
