# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Which models `ExportableDetector` reproduces. Any other must be refused: its file would compute something else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from torch import nn

from ..modeling import DCNROIPooler, MaskHeadPerStage
from ..modeling.mmdet import MMDetCascadeROIHeads
from .request import USE_BACKBONE


def check_model(model: Any, part: str = "detector") -> None:
    """Refuses a model with a part that computes something else than Detectron2's part of this kind.

    A subclass is taken if it inherits the methods that a prediction runs.

    Raises:
        ValueError: it names the class.
    """
    for name in ("backbone", "pixel_mean", "pixel_std"):
        if not hasattr(model, name):
            raise ValueError(f"a model of the class {_name(model)} cannot be exported: it has no {name}")
    if square := dict(getattr(model.backbone, "padding_constraints", None) or {}).get("square_size", 0):
        raise ValueError(
            f"the backbone {_name(model.backbone)} pads images to squares of {square} pixels, not supported"
        )
    if part == "backbone":
        return
    _check(model, "model", [GeneralizedRCNN], ["inference", "preprocess_image", "forward"])
    rpn = model.proposal_generator
    _check(rpn, "proposal generator", [RPN], ["forward", "predict_proposals", "_decode_proposals"])
    _check(rpn.anchor_generator, "anchor generator", [DefaultAnchorGenerator], ["forward", "_grid_anchors"])
    _check(rpn.box2box_transform, "box transform", [Box2BoxTransform], ["apply_deltas"])
    heads = model.roi_heads
    steps = ["forward", "forward_with_given_boxes", "_forward_box", "_forward_mask"]
    # The last two differ from Detectron2's in what ExportableDetector knows: scores and masks of a cascade.
    known = [MMDetCascadeROIHeads, CascadeROIHeads, StandardROIHeads]
    _check(heads, "RoI heads", known, [*steps, *(["_run_stage"] if isinstance(heads, CascadeROIHeads) else [])])
    if getattr(heads, "keypoint_on", False):
        raise ValueError(f"the RoI heads have a keypoint head, which cannot be exported{USE_BACKBONE}")
    _check(heads.box_pooler, "box pooler", [DCNROIPooler, ROIPooler], ["forward"])
    for predictor in _each(heads.box_predictor):
        _check(predictor, "box predictor", [FastRCNNOutputLayers], ["inference", "predict_boxes", "predict_probs"])
        _check(predictor.box2box_transform, "box transform", [Box2BoxTransform], ["apply_deltas"])
        if predictor.use_sigmoid_ce:
            raise ValueError(f"the box predictor has use_sigmoid_ce, whose scores cannot be exported{USE_BACKBONE}")
        if predictor.test_topk_per_image < 1:
            raise ValueError(
                f"test_topk_per_image of the box predictor is {predictor.test_topk_per_image}; a graph has a fixed "
                "number of detections, which must be at least 1"
            )
    if heads.mask_on:
        _check(heads.mask_pooler, "mask pooler", [DCNROIPooler, ROIPooler], ["forward"])
        _check(heads.mask_head, "mask head", [MaskHeadPerStage, BaseMaskRCNNHead], ["forward"])
        for head in _each(heads.mask_head):
            _check(head, "mask head", [BaseMaskRCNNHead], ["forward"])


def _each(layers: Any) -> Iterable[Any]:
    return layers if isinstance(layers, nn.ModuleList) else [layers]


def _check(layer: Any, what: str, known: list[type], methods: list[str]) -> None:
    """Refuses a layer that is of none of the `known` classes, or has some of its `methods` from another class."""
    for base in known:
        if isinstance(layer, base):
            changed = [name for name in methods if getattr(type(layer), name, None) is not getattr(base, name, None)]
            if not changed:
                return
            raise ValueError(
                f"the {what} {_name(layer)} cannot be exported: its {', '.join(changed)} differ from those of "
                f"{base.__name__}{USE_BACKBONE}"
            )
    expected = " or ".join(base.__name__ for base in known)
    raise ValueError(f"the {what} {_name(layer)} cannot be exported; {expected} can{USE_BACKBONE}")


def _name(layer: Any) -> str:
    return type(layer).__name__
