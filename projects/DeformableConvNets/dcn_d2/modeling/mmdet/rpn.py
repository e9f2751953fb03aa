# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Detectron2's region proposal network with MMDetection's rules for training, each behind a config key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ...config import with_dcn_keys
from ...config.checks import check_part
from .matcher import MinimumIoUMatcher


@PROPOSAL_GENERATOR_REGISTRY.register()
class DCNRPN(RPN):
    """Detectron2's `RPN`, which with the keys of MODEL.DCN labels anchors and averages losses as MMDetection does.

    The keys are RPN_LOW_QUALITY_IOU, RPN_PADDING_DIVISOR and RPN_LOSS_PER_SAMPLE. With their defaults it is an `RPN`.
    They change training only: proposals at test time are the same.

    Args:
        padding_divisor: the image is padded to multiples of this, and anchors whose centre lies outside of it are left
            out of matching and sampling, as are those that `anchor_boundary_thresh` excludes. 0 keeps all anchors.
        loss_per_sample: the losses are averages over the sampled anchors, and not sums divided by the number of
            anchors that should be sampled.
        kwargs: arguments of `RPN`.
    """

    @configurable
    def __init__(self, *, padding_divisor: int = 0, loss_per_sample: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.padding_divisor = padding_divisor
        self.loss_per_sample = loss_per_sample

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Reads the keys of `RPN` and those of MODEL.DCN."""
        cfg = with_dcn_keys(cfg)
        check_part(cfg, "MODEL.PROPOSAL_GENERATOR.NAME", cls.__name__)
        arguments = super().from_config(cfg, input_shape)
        dcn, rpn = cfg.MODEL.DCN, cfg.MODEL.RPN
        if dcn.RPN_LOW_QUALITY_IOU >= 0:
            arguments["anchor_matcher"] = MinimumIoUMatcher(rpn.IOU_THRESHOLDS, rpn.IOU_LABELS, dcn.RPN_LOW_QUALITY_IOU)
        return arguments | {
            "padding_divisor": dcn.RPN_PADDING_DIVISOR,
            "loss_per_sample": dcn.RPN_LOSS_PER_SAMPLE,
        }

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels and samples anchors as `RPN` does, but only those that take part in each image.

        Args:
            anchors: (A_l, 4) boxes of each feature map; A is the sum of their numbers.
            gt_instances: the ground truth of each of the N images.

        Returns:
            Labels, N tensors (A,): 1 and 0 for sampled anchors, -1 for all others. And matched ground-truth boxes, N
            tensors (A, 4), which only count where the label is 1.
        """
        if self.padding_divisor == 0:
            return super().label_and_sample_anchors(anchors, gt_instances)
        everything = Boxes.cat(anchors)
        labels, boxes = [], []
        for instances in gt_instances:
            inside = self._take_part(everything, instances.image_size)
            (inside_labels,), (inside_boxes,) = super().label_and_sample_anchors([everything[inside]], [instances])
            labels.append(inside_labels.new_full((len(everything),), -1).masked_scatter(inside, inside_labels))
            boxes.append(torch.zeros_like(everything.tensor).masked_scatter(inside[:, None], inside_boxes))
        return labels, boxes

    def _take_part(self, anchors: Boxes, image_size: tuple[int, int]) -> Tensor:
        height, width = (math.ceil(side / self.padding_divisor) * self.padding_divisor for side in image_size)
        # Centres are whole pixels, at least 4 apart, up to rounding. So the half pixel only makes up for rounding.
        x, y = anchors.get_centers().unbind(1)
        inside = (x < width - 0.5) & (y < height - 0.5)
        if self.anchor_boundary_thresh >= 0:
            inside &= anchors.inside_box(image_size, self.anchor_boundary_thresh)
        return inside

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Gives loss_rpn_cls and loss_rpn_loc. It takes the arguments of `RPN.losses`."""
        losses = super().losses(anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes)
        if not self.loss_per_sample:
            return losses
        # As in MMDetection, an image without positive samples counts as having one, and so with negative ones.
        samples = sum((labels == kind).sum().clamp(min=1) for labels in gt_labels for kind in (0, 1))
        scale = self.batch_size_per_image * len(gt_labels) / samples
        return {name: loss * scale for name, loss in losses.items()}
