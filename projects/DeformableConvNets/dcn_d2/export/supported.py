# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Which models `ExportableDetector` reproduces. Any other must be refused: its file would compute something else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
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
    constraints = dict(getattr(model.backbone, "padding_constraints", None) or {})
    if square := constraints.get("square_size", 0):
        raise ValueError(
            f"the backbone {_name(model.backbone)} pads images to squares of {square} pixels, not supported"
        )
    if (unit := constraints.get("size_divisibility", 0)) not in (0, model.backbone.size_divisibility):
        raise ValueError(
            f"the backbone {_name(model.backbone)} pads images to multiples of {unit} by its padding_constraints, and "
            f"of {model.backbone.size_divisibility} by its size_divisibility: make the two equal"
        )
    _check_dtype(model)
    if part == "backbone":
        return
    steps = ["inference", "preprocess_image", "_move_to_current_device", "forward"]
    _check(model, "model", [GeneralizedRCNN], steps)
    rpn = model.proposal_generator
    _check(rpn, "proposal generator", [RPN], ["forward", "predict_proposals", "_decode_proposals"])
    _check(rpn.anchor_generator, "anchor generator", [DefaultAnchorGenerator], ["forward", "_grid_anchors"])
    _check(rpn.box2box_transform, "box transform", [Box2BoxTransform], ["apply_deltas"])
    heads = model.roi_heads
    steps = ["forward", "forward_with_given_boxes", "_forward_box", "_forward_mask"]
    # The last two differ from Detectron2's in what ExportableDetector knows: scores and masks of a cascade.
    known = [MMDetCascadeROIHeads, CascadeROIHeads, StandardROIHeads]
    if isinstance(heads, CascadeROIHeads):
        steps += ["_run_stage", "_create_proposals_from_boxes"]
    _check(heads, "RoI heads", known, steps)
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
    _check_hooks(model)


def _check_dtype(model: nn.Module) -> None:
    """Refuses weights that are not float32: the model itself would fail on images, or round otherwise than the file."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ValueError(
                f"{name} of the model is {str(value.dtype).removeprefix('torch.')}, but a float32 model is exported: "
                "call its float(); dtype says in which type the file computes"
            )


def _check_hooks(model: Any) -> None:
    """Refuses forward hooks of parts whose `forward` the graph does not call: the file would compute without them."""
    heads = model.roi_heads
    masks = [heads.mask_pooler, heads.mask_head, *_each(heads.mask_head)] if heads.mask_on else []
    for layer in (model.proposal_generator, heads, heads.box_pooler, *masks):
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise ValueError(f"{_name(layer)} has forward hooks, which a file cannot run: remove them, then export")


def _each(layers: Any) -> Iterable[Any]:
    return layers if isinstance(layers, nn.ModuleList) else [layers]


def _check(layer: Any, what: str, known: list[type], methods: list[str]) -> None:
    """Refuses a layer that is of none of the `known` classes, or has some of its `methods` from elsewhere."""
    for base in known:
        if isinstance(layer, base):
            changed = [
                name
                for name in methods
                if name in vars(layer) or getattr(type(layer), name, None) is not getattr(base, name, None)
            ]
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
