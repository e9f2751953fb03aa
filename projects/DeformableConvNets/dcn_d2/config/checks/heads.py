# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Checks that the keys of RPN and RoI heads agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode

from ..access import value_of
from ..messages import listed
from ..rules import DETECTRON2_POOLERS
from .parts import (
    OUR_HEADS,
    Problem,
    has_rpn,
    has_standard_heads,
    heads_with_poolers,
    is_kind_of,
    is_known,
    proposal_generator,
    reads_roi_heads,
    roi_heads,
)


def check_labels(cfg: CfgNode) -> Iterator[Problem]:
    """Thresholds divide IoU into intervals, of which each needs a label."""
    for node in ("RPN", "ROI_HEADS", "RETINANET"):
        thresholds, labels = len(cfg.MODEL[node].IOU_THRESHOLDS), len(cfg.MODEL[node].IOU_LABELS)
        if labels != thresholds + 1:
            key = f"MODEL.{node}.IOU_LABELS"
            yield key, f"{key} must have one value more than MODEL.{node}.IOU_THRESHOLDS ({thresholds}), got {labels}"


def check_box_weights(cfg: CfgNode) -> Iterator[Problem]:
    """Boxes have four numbers, rotated boxes five, and each number has a weight."""
    from detectron2.modeling.proposal_generator.rrpn import RRPN
    from detectron2.modeling.roi_heads.rotated_fast_rcnn import RROIHeads

    readers: list[tuple[str, Any, type]] = []
    if has_rpn(cfg):
        readers.append(("MODEL.RPN", proposal_generator(cfg), RRPN))
    if reads_roi_heads(cfg):
        readers.append(("MODEL.ROI_BOX_HEAD", roi_heads(cfg), RROIHeads))
    for node, part, rotated in readers:
        if not is_known(part):
            continue
        key, expected = f"{node}.BBOX_REG_WEIGHTS", 5 if issubclass(part, rotated) else 4
        weights = value_of(cfg, key)
        if len(weights) != expected:
            yield key, f"{key} must have {expected} values, as many as the boxes of {part.__name__}, got {weights}"


def check_poolers(cfg: CfgNode) -> Iterator[Problem]:
    """Only the heads of dcn_d2 build the poolers of dcn_d2."""
    heads = roi_heads(cfg)
    if not (reads_roi_heads(cfg) and getattr(heads, "__module__", "").startswith("detectron2.")):
        return
    for head in heads_with_poolers(cfg):
        pooler = cfg.MODEL[head].POOLER_TYPE
        if pooler and pooler not in DETECTRON2_POOLERS:
            key = f"MODEL.{head}.POOLER_TYPE"
            yield (
                key,
                f"{key} is {pooler!r}, which needs MODEL.ROI_HEADS.NAME {listed(OUR_HEADS)}, got "
                f"{cfg.MODEL.ROI_HEADS.NAME!r} (which knows {listed(DETECTRON2_POOLERS)})",
            )


def check_heads(cfg: CfgNode) -> Iterator[Problem]:
    """A box head must have layers, and norms must fit their widths."""
    if not has_standard_heads(cfg):
        return
    box = cfg.MODEL.ROI_BOX_HEAD
    if box.NAME == "FastRCNNConvFCHead" and box.NUM_FC + box.NUM_CONV == 0:
        yield (
            "MODEL.ROI_BOX_HEAD.NUM_FC",
            "MODEL.ROI_BOX_HEAD.NUM_FC and NUM_CONV are both 0, but FastRCNNConvFCHead needs a layer",
        )
    mask = [("ROI_MASK_HEAD", cfg.MODEL.ROI_MASK_HEAD)] if cfg.MODEL.MASK_ON else []
    # Only these need a pooler: other heads, for example PointRend's, may take whole feature maps.
    takers = {"ROI_MASK_HEAD": "MaskRCNNConvUpsampleHead", "ROI_KEYPOINT_HEAD": "KRCNNConvDeconvUpsampleHead"}
    for name in heads_with_poolers(cfg):
        if not cfg.MODEL[name].POOLER_TYPE and cfg.MODEL[name].NAME == takers.get(name):
            key = f"MODEL.{name}.POOLER_TYPE"
            yield key, f"{cfg.MODEL[name].NAME} (MODEL.{name}.NAME) needs a pooler, but {key} is empty"
    for name, head in [("ROI_BOX_HEAD", box), *mask]:
        if head.NUM_CONV and head.NORM == "GN" and head.CONV_DIM % 32:
            yield (
                f"MODEL.{name}.NORM",
                f"MODEL.{name}.NORM is GN, which has 32 groups: MODEL.{name}.CONV_DIM must be a multiple of 32, got "
                f"{head.CONV_DIM}",
            )


def check_cascade(cfg: CfgNode) -> Iterator[Problem]:
    """All keys of a cascade must say the same number of stages, and its boxes and masks need some other keys."""
    from detectron2.modeling.roi_heads import CascadeROIHeads

    if not (reads_roi_heads(cfg) and is_kind_of(roi_heads(cfg), CascadeROIHeads)):
        return
    cascade, node = cfg.MODEL.ROI_BOX_CASCADE_HEAD, "MODEL.ROI_BOX_CASCADE_HEAD"
    stages, weights = len(cascade.IOUS), len(cascade.BBOX_REG_WEIGHTS)
    if stages != weights:
        yield (
            f"{node}.BBOX_REG_WEIGHTS",
            f"{node}.BBOX_REG_WEIGHTS has {weights} values, but {node}.IOUS says that there are {stages} stages",
        )
    losses = len(value_of(cfg, "MODEL.DCN.CASCADE_LOSS_WEIGHTS", ()))
    if cfg.MODEL.ROI_HEADS.NAME in OUR_HEADS and losses not in (0, stages):
        yield (
            "MODEL.DCN.CASCADE_LOSS_WEIGHTS",
            f"MODEL.DCN.CASCADE_LOSS_WEIGHTS has {losses} values, but {node}.IOUS says that there are {stages} stages",
        )
    first = cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0]
    if cascade.IOUS[0] != first:
        yield f"{node}.IOUS", f"{node}.IOUS must begin with MODEL.ROI_HEADS.IOU_THRESHOLDS, {first}, got {cascade.IOUS}"
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        key = "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"
        yield key, f"{key} must be True with MODEL.ROI_HEADS.NAME {cfg.MODEL.ROI_HEADS.NAME}, got False"
    if cfg.MODEL.MASK_ON and value_of(cfg, "MODEL.DCN.CASCADE_MASK_HEADS", False):
        if not cfg.MODEL.DCN.CASCADE_RESAMPLE:
            yield (
                "MODEL.DCN.CASCADE_MASK_HEADS",
                "MODEL.DCN.CASCADE_MASK_HEADS needs MODEL.DCN.CASCADE_RESAMPLE: the boxes that Detectron2 keeps for "
                "the later stages have no ground-truth masks",
            )
        if not cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE and cfg.MODEL.ROI_MASK_HEAD.NAME != "MaskRCNNConvUpsampleHead":
            yield (
                "MODEL.ROI_MASK_HEAD.POOLER_TYPE",
                "MODEL.DCN.CASCADE_MASK_HEADS needs a pooler, but MODEL.ROI_MASK_HEAD.POOLER_TYPE is empty",
            )
