# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Detectron2's RoI heads in evaluation mode, with numbers of boxes that do not depend on the image."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.layers.mask_ops import _do_paste_mask
from detectron2.modeling.roi_heads import CascadeROIHeads
from torch import Tensor, nn

from ..modeling import MaskHeadPerStage
from ..modeling.poolers import pool_rois
from .proposals import clip, detect


def rois_of(boxes: Tensor) -> Tensor:
    """Gives boxes (N, R, 4) of N images as RoIs (N * R, 5), with the number of the image before each box."""
    images = torch.arange(boxes.shape[0], dtype=boxes.dtype, device=boxes.device)[:, None, None]
    return torch.cat([images.expand(-1, boxes.shape[1], -1), boxes], dim=-1).flatten(0, 1)


def pool(pooler: nn.Module, maps: list[Tensor], boxes: Tensor) -> Tensor:
    """Pools boxes (N, R, 4) from maps of N images: (N * R, C, h, w). RoIs have float32 coordinates, so maps do too."""
    return pool_rois(pooler, [each.float() for each in maps], rois_of(boxes)).to(maps[0].dtype)


def find_boxes(
    heads: Any, features: Mapping[str, Tensor], proposals: Tensor, valid: Tensor, image_sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the box heads, one or a cascade of several, on proposals (N, P, 4); gives what `detect` gives."""
    maps = [features[name] for name in heads.box_in_features]
    if isinstance(heads, CascadeROIHeads):
        boxes, scores, last = _run_cascade(heads, maps, proposals, image_sizes)
    else:
        last = heads.box_predictor
        logits, boxes = _run_head(heads.box_head, last, pool(heads.box_pooler, maps, proposals), proposals)
        scores = logits.softmax(dim=-1)
    return detect(
        boxes,
        scores.view(*proposals.shape[:2], -1),
        valid,
        image_sizes,
        score_threshold=last.test_score_thresh,
        nms_threshold=last.test_nms_thresh,
        detections=last.test_topk_per_image,
    )


def _run_head(head: nn.Module, predictor: Any, pooled: Tensor, proposals: Tensor) -> tuple[Tensor, Tensor]:
    """Gives class logits (N * P, C + 1) and boxes (N, P, K, 4) for pooled features (N * P, ...) of proposals."""
    logits, deltas = predictor(head(pooled))
    boxes = predictor.box2box_transform.apply_deltas(deltas.float(), proposals.flatten(0, 1))
    return logits.float(), boxes.view(*proposals.shape[:2], -1, 4)


def _run_cascade(heads: Any, maps: list[Tensor], proposals: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Runs all stages, each on the boxes of the one before; gives the last boxes, all scores, the last predictor."""
    all_logits: list[Tensor] = []
    boxes = proposals[:, :, None]
    for head, predictor in zip(heads.box_head, heads.box_predictor):
        if all_logits:
            proposals = clip(boxes[:, :, 0], image_sizes[:, None])
        logits, boxes = _run_head(head, predictor, pool(heads.box_pooler, maps, proposals), proposals)
        all_logits.append(logits)
    if getattr(heads, "average_logits", False):
        return boxes, _average(all_logits).softmax(dim=-1), predictor
    return boxes, _average([logits.softmax(dim=-1) for logits in all_logits]), predictor


def _average(tensors: list[Tensor]) -> Tensor:
    """Adds first to last, as Detectron2 does."""
    return functools.reduce(torch.add, tensors) / len(tensors)


def find_masks(heads: Any, features: Mapping[str, Tensor], boxes: Tensor, classes: Tensor) -> Tensor:
    """Gives the masks (N, D, h, w) of detections (N, D, 4), as probabilities within each box."""
    pooled = pool(heads.mask_pooler, [features[name] for name in heads.mask_in_features], boxes)
    mask_heads: list[Any] = (
        list(heads.mask_head) if isinstance(heads.mask_head, MaskHeadPerStage) else [heads.mask_head]
    )
    masks = [_masks_of_class(head.layers(pooled).float(), classes.flatten()) for head in mask_heads]
    averaged = masks[0] if len(masks) == 1 else torch.stack(masks).mean(dim=0)
    return averaged.unflatten(0, (-1, boxes.shape[1]))


def _masks_of_class(logits: Tensor, classes: Tensor) -> Tensor:
    """Gives the probabilities (R, h, w) of one class for each of R masks, from logits of all (R, C, h, w)."""
    if logits.shape[1] == 1:
        return logits[:, 0].sigmoid()
    chosen = classes.clamp(min=0)[:, None, None, None].expand(-1, 1, logits.shape[2], logits.shape[3])
    return logits.gather(1, chosen)[:, 0].sigmoid()


def paste(masks: Tensor, boxes: Tensor, output_size: Tensor) -> Tensor:
    """Pastes masks (N, D, h, w) of boxes (N, D, 4) into images of a size (2,): bool (N, D, height, width)."""
    # While tracing, these are tensors, and stay variable in the trace. torch.export makes symbols of them.
    height, width = output_size.unbind() if torch.jit.is_tracing() else output_size.tolist()
    pasted, _ = _do_paste_mask(masks.flatten(0, 1)[:, None], boxes.flatten(0, 1), height, width, skip_empty=False)
    return (pasted >= 0.5).unflatten(0, (-1, boxes.shape[1]))
