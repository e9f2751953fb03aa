# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Cascade R-CNN as MMDetection and the paper compute it, each difference from Detectron2 behind a config key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, select_foreground_proposals
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ...config import with_dcn_keys
from .mask_heads import MaskHeadPerStage
from .matcher import MinimumIoUMatcher


def _mark(images: list[Instances], is_ground_truth: bool) -> list[Instances]:
    """Copies proposals or targets, and adds the field is_ground_truth, which tells them apart once they are mixed."""
    marked = []
    for one_image in images:
        device = (one_image.gt_boxes if is_ground_truth else one_image.proposal_boxes).device
        mark = torch.full((len(one_image),), is_ground_truth, device=device)
        marked.append(Instances(one_image.image_size, **one_image.get_fields(), is_ground_truth=mark))
    return marked


class _StageOutput(NamedTuple):
    predictor: FastRCNNOutputLayers
    predictions: tuple[Tensor, Tensor]  # class logits and box deltas of all images
    proposals: list[Instances]  # what they were predicted for


class MMDetCascadeROIHeads(CascadeROIHeads):
    """Detectron2's `CascadeROIHeads`, which with the keys of MODEL.DCN works as MMDetection's and the paper's.

    It is not registered: `DCNCascadeROIHeads` adds the poolers of dcn_d2 to it. With all keys at their defaults it is
    `CascadeROIHeads`.

    Args:
        average_logits: scores are the softmax of the class logits averaged over the stages, and not the average of the
            stages' probabilities (MODEL.DCN.CASCADE_AVERAGE_LOGITS).
        resample: in training, each stage matches and samples anew, from the boxes of the stage before and the ground
            truth (CASCADE_RESAMPLE). Otherwise later stages refine the boxes that were sampled for the first.
        stage_loss_weights: for each stage, a factor of all its losses (CASCADE_LOSS_WEIGHTS).
        scale_gradients: the gradient that each stage passes on to the pooled features is divided by the number of
            stages (CASCADE_SCALE_GRADIENTS).
        kwargs: arguments of `CascadeROIHeads`. If mask_head is a `MaskHeadPerStage` (CASCADE_MASK_HEADS), each of its
            heads trains on the samples of its stage. Any other mask head trains on those of the first stage.
    """

    @configurable
    def __init__(
        self,
        *,
        average_logits: bool = False,
        resample: bool = False,
        stage_loss_weights: Sequence[float] = (),
        scale_gradients: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.average_logits = average_logits
        self.resample = resample
        self.stage_loss_weights = tuple(stage_loss_weights) or (1.0,) * self.num_cascade_stages
        self.scale_gradients = scale_gradients
        self.mask_head_per_stage = self.mask_on and isinstance(self.mask_head, MaskHeadPerStage)
        if len(self.stage_loss_weights) != self.num_cascade_stages:
            raise ValueError(
                f"MODEL.DCN.CASCADE_LOSS_WEIGHTS has {len(self.stage_loss_weights)} values, but "
                f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS says that there are {self.num_cascade_stages} stages"
            )
        if self.mask_head_per_stage and not resample:
            raise ValueError(
                "MODEL.DCN.CASCADE_MASK_HEADS needs MODEL.DCN.CASCADE_RESAMPLE: the boxes that Detectron2 keeps for "
                "the later stages have no ground-truth masks"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Reads the keys of `CascadeROIHeads` and those of MODEL.DCN."""
        cfg = with_dcn_keys(cfg)
        arguments = super().from_config(cfg, input_shape)
        dcn, ious = cfg.MODEL.DCN, cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS
        if dcn.ROI_LOW_QUALITY_IOU >= 0:
            appended = cfg.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT
            arguments["proposal_matchers"] = [
                # Without resampling, later stages refine the first stage's samples, which do not end with ground truth.
                MinimumIoUMatcher(
                    [iou], [0, 1], dcn.ROI_LOW_QUALITY_IOU, appended and (stage == 0 or dcn.CASCADE_RESAMPLE)
                )
                for stage, iou in enumerate(ious)
            ]
        return arguments | {
            "average_logits": dcn.CASCADE_AVERAGE_LOGITS,
            "resample": dcn.CASCADE_RESAMPLE,
            "stage_loss_weights": dcn.CASCADE_LOSS_WEIGHTS,
            "scale_gradients": dcn.CASCADE_SCALE_GRADIENTS,
        }

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        if not (cfg.MODEL.MASK_ON and cfg.MODEL.DCN.CASCADE_MASK_HEADS):
            return super()._init_mask_head(cfg, input_shape)
        arguments = super()._init_mask_head(cfg, input_shape)
        heads = [arguments["mask_head"]]
        while len(heads) < len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS):
            heads.append(super()._init_mask_head(cfg, input_shape)["mask_head"])
        return arguments | {"mask_head": MaskHeadPerStage(heads)}

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances], stage: int = 0
    ) -> list[Instances]:
        """Labels and samples proposals with the matcher of `stage`.

        If stages resample, the result has the field is_ground_truth.
        """
        if self.resample:
            proposals, targets = _mark(proposals, False), _mark(targets, True)
        self.proposal_matcher = self.proposal_matchers[stage]
        return super().label_and_sample_proposals(proposals, targets)

    def _forward_box(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> dict[str, Tensor] | list[Instances]:
        if not self.training and not self.average_logits:
            return super()._forward_box(features, proposals)
        outputs = self._run_stages([features[name] for name in self.box_in_features], proposals, targets)
        if self.training:
            return self._stage_losses(features, outputs)
        logits = sum(output.predictions[0] for output in outputs) / len(outputs)
        predictor, (_, deltas), proposals = outputs[-1]
        return predictor.inference((logits, deltas), proposals)[0]

    def _run_stages(
        self, features: list[Tensor], proposals: list[Instances], targets: list[Instances] | None
    ) -> list[_StageOutput]:
        outputs: list[_StageOutput] = []
        for stage, predictor in enumerate(self.box_predictor):
            if stage > 0:
                boxes = outputs[-1].predictor.predict_boxes(outputs[-1].predictions, proposals)
                proposals = self._next_proposals(boxes, proposals, stage, targets)
            outputs.append(_StageOutput(predictor, self._run_stage(features, proposals, stage), proposals))
        return outputs

    def _run_stage(self, features: list[Tensor], proposals: list[Instances], stage: int) -> tuple[Tensor, Tensor]:
        if self.scale_gradients:
            return super()._run_stage(features, proposals, stage)
        pooled = self.box_pooler(features, [one_image.proposal_boxes for one_image in proposals])
        return self.box_predictor[stage](self.box_head[stage](pooled))

    def _next_proposals(
        self,
        boxes: Sequence[Tensor],
        proposals: list[Instances],
        stage: int,
        targets: list[Instances] | None,
    ) -> list[Instances]:
        """Makes the proposals of `stage` from the boxes that the stage before predicted for its `proposals`."""
        if not (self.training and self.resample):
            following = self._create_proposals_from_boxes(boxes, [one_image.image_size for one_image in proposals])
            return self._match_and_label_boxes(following, stage, targets) if self.training else following
        assert targets is not None
        refined = []
        for one_image, its_boxes in zip(proposals, boxes):
            kept = ~one_image.is_ground_truth  # ground truth is added again below, unchanged
            clipped = Boxes(its_boxes.detach()[kept])
            clipped.clip(one_image.image_size)
            logits = one_image.objectness_logits[kept]
            refined.append(Instances(one_image.image_size, proposal_boxes=clipped, objectness_logits=logits))
        with get_event_storage().name_scope(f"stage{stage}"):
            return self.label_and_sample_proposals(refined, targets, stage)

    def _stage_losses(self, features: Mapping[str, Tensor], outputs: list[_StageOutput]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for stage, (output, weight) in enumerate(zip(outputs, self.stage_loss_weights)):
            with get_event_storage().name_scope(f"stage{stage}"):
                stage_losses = output.predictor.losses(output.predictions, output.proposals)
                if self.mask_head_per_stage:
                    foreground, _ = select_foreground_proposals(output.proposals, self.num_classes)
                    boxes = [one_image.proposal_boxes for one_image in foreground]
                    pooled = self.mask_pooler([features[name] for name in self.mask_in_features], boxes)
                    stage_losses |= self.mask_head[stage](pooled, foreground)
            losses |= {f"{name}_stage{stage}": weight * loss for name, loss in stage_losses.items()}
        return losses

    def _forward_mask(
        self, features: Mapping[str, Tensor], instances: list[Instances]
    ) -> dict[str, Tensor] | list[Instances]:
        if self.training and self.mask_head_per_stage:
            return {}  # _stage_losses computes the mask losses, since it knows the samples of each stage
        return super()._forward_mask(features, instances)
