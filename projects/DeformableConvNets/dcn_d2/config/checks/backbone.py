# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Checks that the keys of ResNet and FPN agree, and that the backbone gives the feature maps that the heads read."""

from __future__ import annotations

import re
from collections.abc import Iterator

from detectron2.config import CfgNode

from ..access import value_of
from ..messages import listed, shorten
from .parts import (
    FPN_BUILDERS,
    RESNET_BUILDERS,
    RETINANET_BUILDERS,
    Problem,
    has_rpn,
    has_standard_heads,
    is_retinanet,
    reads_roi_heads,
)


def check_resnet(cfg: CfgNode) -> Iterator[Problem]:
    """Depth, widths, groups and norm must fit each other, in the ResNets of dcn_d2 and Detectron2."""
    if cfg.MODEL.BACKBONE.NAME not in (*RESNET_BUILDERS, *FPN_BUILDERS, *RETINANET_BUILDERS):
        return
    resnets = cfg.MODEL.RESNETS
    deformed = [stage for stage, deform in enumerate(resnets.DEFORM_ON_PER_STAGE) if deform]
    if resnets.DEPTH in (18, 34):
        if deformed:
            yield (
                "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
                f"MODEL.RESNETS.DEFORM_ON_PER_STAGE={list(resnets.DEFORM_ON_PER_STAGE)} needs bottleneck blocks, which "
                f"MODEL.RESNETS.DEPTH={resnets.DEPTH} does not have; use 50, 101 or 152",
            )
        for key, needed in (("RES2_OUT_CHANNELS", 64), ("RES5_DILATION", 1), ("NUM_GROUPS", 1)):
            if resnets[key] != needed:
                yield (
                    f"MODEL.RESNETS.{key}",
                    f"MODEL.RESNETS.{key} must be {needed} with DEPTH={resnets.DEPTH}, got {resnets[key]}",
                )
    groups = resnets.DEFORM_NUM_GROUPS
    if deformed and resnets.DEPTH not in (18, 34):
        channels = resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * 2 ** deformed[0]
        if channels % groups:
            divisors = [number for number in range(1, min(channels, 64) + 1) if channels % number == 0]
            yield (
                "MODEL.RESNETS.DEFORM_NUM_GROUPS",
                f"MODEL.RESNETS.DEFORM_NUM_GROUPS must divide the {channels} channels of the 3x3 convolutions of "
                f"res{deformed[0] + 2}, for example {listed(divisors)}, got {groups}",
            )
    if resnets.NORM == "GN":
        widths = {"STEM_OUT_CHANNELS": resnets.STEM_OUT_CHANNELS, "RES2_OUT_CHANNELS": resnets.RES2_OUT_CHANNELS}
        if resnets.DEPTH not in (18, 34):
            widths["NUM_GROUPS * WIDTH_PER_GROUP"] = resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP
        for key, width in widths.items():
            if width % 32:
                yield (
                    "MODEL.RESNETS.NORM",
                    f"MODEL.RESNETS.NORM is GN, which has 32 groups: MODEL.RESNETS.{key} must be a multiple of 32, got "
                    f"{width}",
                )


def check_fpn(cfg: CfgNode) -> Iterator[Problem]:
    """The FPNs of dcn_d2 and Detectron2 need stages of the ResNet that follow each other, up to the last one."""
    if cfg.MODEL.BACKBONE.NAME not in (*FPN_BUILDERS, *RETINANET_BUILDERS):
        return
    key, fpn, given = "MODEL.FPN.IN_FEATURES", cfg.MODEL.FPN, list(cfg.MODEL.RESNETS.OUT_FEATURES)
    levels = list(fpn.IN_FEATURES)
    missing = [level for level in levels if level not in given]
    if missing:
        yield key, f"{key} has {listed(missing)}, but MODEL.RESNETS.OUT_FEATURES has only {listed(given)}"
    elif levels not in [["res2", "res3", "res4", "res5"][start:] for start in range(4)]:
        yield key, f"{key} must be stages that follow each other, from res2, res3, res4 or res5 to res5, got {levels}"
    elif cfg.MODEL.RESNETS.RES5_DILATION != 1 and len(levels) > 1:
        yield (
            "MODEL.RESNETS.RES5_DILATION",
            "MODEL.RESNETS.RES5_DILATION must be 1 below an FPN, whose levels halve from one to the next, "
            f"got {cfg.MODEL.RESNETS.RES5_DILATION}",
        )
    if fpn.NORM == "GN" and fpn.OUT_CHANNELS % 32:
        yield (
            "MODEL.FPN.NORM",
            "MODEL.FPN.NORM is GN, which has 32 groups: MODEL.FPN.OUT_CHANNELS must be a multiple of 32, got "
            f"{fpn.OUT_CHANNELS}",
        )


def _features(cfg: CfgNode) -> list[str] | None:
    """Gives the names of the feature maps that the backbone computes, or None if that is not known here."""
    name = cfg.MODEL.BACKBONE.NAME
    if name in RESNET_BUILDERS:
        return list(cfg.MODEL.RESNETS.OUT_FEATURES)
    if name not in (*FPN_BUILDERS, *RETINANET_BUILDERS):
        return None
    levels = [level.replace("res", "p") for level in cfg.MODEL.FPN.IN_FEATURES]
    return [*levels, "p6"] if name in FPN_BUILDERS else [*levels, "p6", "p7"]


def check_features(cfg: CfgNode) -> Iterator[Problem]:
    """The backbone must give the feature maps that RPN and heads read, and there must be anchors for each of them."""
    given = _features(cfg)
    readers = [
        *(["MODEL.RPN.IN_FEATURES"] if has_rpn(cfg) else []),
        *(["MODEL.ROI_HEADS.IN_FEATURES"] if reads_roi_heads(cfg) else []),
        *(["MODEL.RETINANET.IN_FEATURES"] if is_retinanet(cfg) else []),
    ]
    for key in readers:
        missing = [level for level in value_of(cfg, key) if given is not None and level not in given]
        if given is not None and missing:
            hint = ""
            if "p7" in missing and cfg.MODEL.BACKBONE.NAME in FPN_BUILDERS:
                hint = "; p7 is in build_dcn_retinanet_resnet_fpn_backbone"
            yield key, f"{key} has {listed(missing)}, but {cfg.MODEL.BACKBONE.NAME} gives only {listed(given)}{hint}"
        elif key == "MODEL.ROI_HEADS.IN_FEATURES" and given is not None and has_standard_heads(cfg):
            names = list(value_of(cfg, key))
            strides = [int(re.sub(r"\D", "", name) or 0) for name in names]
            if strides != list(range(strides[0], strides[0] + len(strides))):
                yield key, f"{key} must have levels that follow one another, from fine to coarse, got {shorten(names)}"
    anchored = [key for key in readers if key != "MODEL.ROI_HEADS.IN_FEATURES"]
    for key in anchored if cfg.MODEL.ANCHOR_GENERATOR.NAME == "DefaultAnchorGenerator" else []:
        levels = len(value_of(cfg, key))
        for anchors in ("SIZES", "ASPECT_RATIOS"):
            lists = len(cfg.MODEL.ANCHOR_GENERATOR[anchors])
            if lists not in (1, levels):
                yield (
                    f"MODEL.ANCHOR_GENERATOR.{anchors}",
                    f"MODEL.ANCHOR_GENERATOR.{anchors} must have a list for each of the {levels} levels of {key}, or "
                    f"one for all, got {lists}",
                )
