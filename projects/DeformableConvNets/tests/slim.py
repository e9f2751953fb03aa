# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Narrow models that build and run in a fraction of a second on one core."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, get_cfg

from dcn_d2 import add_dcn_config

SLIM = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.WEIGHTS", ""),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 32),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 16),
    *("MODEL.FPN.OUT_CHANNELS", 32),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 32),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 32),
    *("MODEL.DCN.POOLER_FC_DIM", 32),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", 100),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("INPUT.MIN_SIZE_TEST", 64),
]


def slim_config(base: CfgNode | None = None, **resnets: Any) -> CfgNode:
    """A config for a narrow model.

    Args:
        base: what to make narrow; by default a plain FPN on the backbone of dcn_d2.
        resnets: values for keys of MODEL.RESNETS.
    """
    cfg = base or get_cfg()
    add_dcn_config(cfg)
    if base is None:
        levels = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.BACKBONE.NAME = "build_dcn_resnet_fpn_backbone"
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES = levels
        cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
        cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
        cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 1
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.merge_from_list(SLIM)
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg
