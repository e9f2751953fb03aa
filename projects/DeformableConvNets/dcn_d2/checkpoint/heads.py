# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The layers of a detector that have outputs for each class or keypoint: what fine-tuning on other data replaces."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import nn


class Head(NamedTuple):
    """One kind of these layers.

    Attributes:
        title: begins a sentence.
        weight: its name in the model, for each of its stages.
        axis: of the weight, that of the outputs.
        things: what it has outputs for.
        each: outputs for each of them; 0 for as many as RetinaNet has anchors at a location.
        others: outputs that are for none of them, such as the background.
    """

    title: str
    weight: str
    axis: int = 0
    things: str = "classes"
    each: int = 1
    others: int = 0


HEADS = (
    Head("the classifier of boxes", r"roi_heads\.box_predictor(\.\d+)?\.cls_score\.weight", others=1),
    Head("the refinement of boxes", r"roi_heads\.box_predictor(\.\d+)?\.bbox_pred\.weight", each=4),
    Head("the head of masks", r"roi_heads\.mask_head(\.\d+)?\.predictor\.weight"),
    Head("the head of keypoints", r"roi_heads\.keypoint_head\.score_lowres\.weight", axis=1, things="keypoints"),
    Head("the classifier of RetinaNet", r"head\.cls_score\.weight", each=0),
)


def describe_replaced_heads(
    model: nn.Module, own: Mapping[str, Any], weights: Mapping[str, Any], problems: Collection[str]
) -> list[str]:
    """Says which heads start afresh because the weights have them for another number of classes or keypoints.

    Args:
        model: that is to be trained.
        own: its entries.
        weights: the entries that its training starts from, by the same names.
        problems: names of the entries that do not fit.
    """
    lines = []
    for head in HEADS:
        layers = [name for name in problems if re.fullmatch(head.weight, name) and name in own and name in weights]
        if not layers:
            continue
        each = head.each or int(model.anchor_generator.num_anchors[0])  # type: ignore[union-attr, index]
        theirs, mine = ((entries[layers[0]].shape[head.axis] - head.others) // each for entries in (weights, own))
        stems = {name.removesuffix("weight") for name in layers}
        fresh = [name for name in problems if name.rpartition(".")[0] + "." in stems]
        lines.append(f"{head.title} is replaced, from {theirs} {head.things} to {mine}: {', '.join(fresh)}")
    return lines
