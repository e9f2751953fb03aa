# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Detectron2's RPN and its choice of detections, with numbers of boxes that do not depend on the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import batched_nms

# Scores below it belong to no box. It is finite because runtimes compare it with the scores.
NO_BOX = -1e30
MINUS_INFINITY = float("-inf")


def propose(rpn: Any, features: Mapping[str, Tensor], image_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Gives the proposals of an `RPN` in evaluation mode, for any number of images.

    Each level offers its MODEL.RPN.PRE_NMS_TOPK_TEST best boxes. Of those that remain after non-maximum suppression,
    the POST_NMS_TOPK_TEST best of all levels are the proposals, as in Detectron2's `find_top_rpn_proposals`.

    Args:
        rpn: Detectron2's.
        features: the maps of the backbone, (N, C, H, W) each.
        image_sizes: (N, 2), heights and widths.

    Returns:
        Boxes (N, P, 4), and whether each is a proposal, (N, P). The others are zeros. P is fixed.
    """
    maps = [features[name] for name in rpn.in_features]
    logits, deltas = rpn.rpn_head(maps)
    best = rpn.pre_nms_topk[False]
    levels = [
        _best_of_level(rpn, level_logits.float(), level_deltas.float(), anchors.tensor, best)
        for level_logits, level_deltas, anchors in zip(logits, deltas, rpn.anchor_generator(maps))
    ]
    boxes, scores = (torch.stack(parts, dim=1) for parts in zip(*levels))  # (N, levels, best, ...)
    usable = is_finite(boxes).all(dim=-1) & is_finite(scores)
    boxes = clip(boxes, image_sizes[:, None, None])
    usable = usable & is_larger(boxes, rpn.min_box_size)
    scores = scores.masked_fill(~usable, MINUS_INFINITY)
    keep = batched_nms(boxes.flatten(0, 1), scores.flatten(0, 1), rpn.nms_thresh)
    scores = scores.masked_fill(~keep.view_as(scores), MINUS_INFINITY)
    number = min(rpn.post_nms_topk[False], len(levels) * best)
    scores, chosen = scores.flatten(1).topk(number, dim=1)
    return take(boxes.flatten(1, 2), chosen, scores > NO_BOX), scores > NO_BOX


def _best_of_level(rpn: Any, logits: Tensor, deltas: Tensor, anchors: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Gives `number` boxes (N, number, 4) and their logits (N, number). Small maps have fewer; the rest gets -inf."""
    scores = logits.permute(0, 2, 3, 1).flatten(1)  # (N, H * W * anchors of a place)
    deltas = deltas.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
    # With these `number` more there are always enough, whatever the size of the map.
    scores = F.pad(scores, (0, number), value=MINUS_INFINITY)
    deltas, anchors = F.pad(deltas, (0, 0, 0, number)), F.pad(anchors, (0, 0, 0, number))
    scores, chosen = scores.topk(number, dim=1)
    deltas = deltas.gather(1, chosen[..., None].expand(-1, -1, 4))
    boxes = rpn.box2box_transform.apply_deltas(deltas.flatten(0, 1), anchors[chosen].flatten(0, 1))
    return boxes.view_as(deltas), scores


def detect(
    boxes: Tensor,
    scores: Tensor,
    valid: Tensor,
    image_sizes: Tensor,
    *,
    score_threshold: float,
    nms_threshold: float,
    detections: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses the detections of each image, as Detectron2's `fast_rcnn_inference` does.

    Args:
        boxes: (N, P, K, 4); K is the number of classes C, or 1 if they share their boxes.
        scores: (N, P, C + 1), the last is the background's.
        valid: (N, P), whether there is a proposal.
        image_sizes: (N, 2), heights and widths.
        score_threshold: scores of detections are above it.
        nms_threshold: of two boxes of a class whose IoU is above it, the one with the lower score goes.
        detections: the largest number of detections in an image.

    Returns:
        Boxes (N, D, 4), scores (N, D) and classes (N, D), best first; where there is no detection 0, 0 and -1.
    """
    usable = valid & is_finite(boxes).flatten(2).all(dim=-1) & is_finite(scores).all(dim=-1)
    boxes = clip(boxes, image_sizes[:, None, None])
    scores = scores[..., :-1]
    scores = scores.masked_fill(~(usable[..., None] & (scores > score_threshold)), MINUS_INFINITY)
    scores = scores.transpose(1, 2)  # (N, C, P)
    boxes = boxes.expand(-1, -1, scores.shape[1], -1).transpose(1, 2)  # (N, C, P, 4)
    keep = batched_nms(boxes.flatten(0, 1), scores.flatten(0, 1), nms_threshold)
    scores = scores.masked_fill(~keep.view_as(scores), MINUS_INFINITY).flatten(1)
    scores, chosen = scores.topk(min(detections, scores.shape[1]), dim=1)
    found = scores > NO_BOX
    classes = torch.div(chosen, boxes.shape[2], rounding_mode="floor")
    return (
        take(boxes.flatten(1, 2), chosen, found),
        scores.masked_fill(~found, 0.0),
        classes.masked_fill(~found, -1),
    )


def take(boxes: Tensor, chosen: Tensor, valid: Tensor) -> Tensor:
    """Picks boxes (N, M, 4) by their numbers (N, K); those that are not `valid` (N, K) become zeros."""
    return boxes.gather(1, chosen[..., None].expand(-1, -1, 4)).masked_fill(~valid[..., None], 0.0)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clips boxes (..., 4) to images of the sizes (..., 2), (height, width)."""
    limits = sizes.to(boxes.dtype).flip(-1)
    limits = torch.cat([limits, limits], dim=-1)
    return torch.minimum(boxes.clamp(min=0), limits)


def is_larger(boxes: Tensor, side: float) -> Tensor:
    """Whether both sides of boxes (..., 4) are longer than `side`."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return (x1 - x0 > side) & (y1 - y0 > side)


def is_finite(values: Tensor) -> Tensor:
    """Whether values are neither infinite nor NaN, by an operator that all runtimes have."""
    return values.abs() < -NO_BOX
