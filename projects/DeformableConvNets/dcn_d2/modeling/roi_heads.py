# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Detectron2's ROI heads with deformable RoI poolers, and Cascade R-CNN as MMDetection computes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    FastRCNNOutputLayers,
    StandardROIHeads,
    select_foreground_proposals,
)
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ..config import with_dcn_keys
from ..config.checks import check_part
from .mask_heads import MaskHeadPerStage
from .matcher import MinimumIoUMatcher
from .poolers import ROI_POOLER_REGISTRY, build_roi_pooler


def _with_detectron2_pooler(cfg: CfgNode, head: str) -> CfgNode:
    """Copies `cfg`, with a POOLER_TYPE for `head` that Detectron2 can build if it has one of dcn_d2's."""
    copy = cfg.clone()
    copy.defrost()
    if copy.MODEL[head].POOLER_TYPE in ROI_POOLER_REGISTRY:
        copy.MODEL[head].POOLER_TYPE = "ROIAlignV2"
    return copy


def _with_own_pooler(
    arguments: dict[str, Any], kind: str, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]
) -> dict[str, Any]:
    """Gives the arguments that Detectron2 made for a head of a kind the pooler of POOLER_TYPE, if the head has one."""
    if arguments.get(f"{kind}_pooler") is None:
        return arguments
    return arguments | {f"{kind}_pooler": build_roi_pooler(cfg, cfg.MODEL[f"ROI_{kind.upper()}_HEAD"], input_shape)}


@ROI_HEADS_REGISTRY.register()
class DCNROIHeads(StandardROIHeads):
    """Detectron2's `StandardROIHeads`, whose POOLER_TYPE may also be one of `ROI_POOLER_REGISTRY`.

    Reads MODEL.DCN.POOLER_FC_DIM, POOLER_MMDET_LEVELS and ROI_LOW_QUALITY_IOU; their defaults and a POOLER_TYPE of
    Detectron2's make it `StandardROIHeads`.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Reads the keys of `StandardROIHeads` and those of MODEL.DCN."""
        cfg = with_dcn_keys(cfg)
        check_part(cfg, "MODEL.ROI_HEADS.NAME", cls.__name__)
        arguments = super().from_config(cfg, input_shape)
        heads, minimum = cfg.MODEL.ROI_HEADS, cfg.MODEL.DCN.ROI_LOW_QUALITY_IOU
        if minimum >= 0 and "proposal_matcher" in arguments:
            arguments["proposal_matcher"] = MinimumIoUMatcher(
                heads.IOU_THRESHOLDS, heads.IOU_LABELS, minimum, truth_appended=heads.PROPOSAL_APPEND_GT
            )
        return arguments

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_box_head(_with_detectron2_pooler(cfg, "ROI_BOX_HEAD"), input_shape)
        return _with_own_pooler(arguments, "box", cfg, input_shape)

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_mask_head(_with_detectron2_pooler(cfg, "ROI_MASK_HEAD"), input_shape)
        return _with_own_pooler(arguments, "mask", cfg, input_shape)

    @classmethod
    def _init_keypoint_head(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_keypoint_head(_with_detectron2_pooler(cfg, "ROI_KEYPOINT_HEAD"), input_shape)
        return _with_own_pooler(arguments, "keypoint", cfg, input_shape)


def _mark(images: list[Instances], is_ground_truth: bool) -> list[Instances]:
    """Copies proposals or targets, with a field that tells them apart when they are mixed."""
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


@ROI_HEADS_REGISTRY.register()
class DCNCascadeROIHeads(DCNROIHeads, CascadeROIHeads):
    """Detectron2's `CascadeROIHeads`, which with the keys of MODEL.DCN works as MMDetection's and the paper's.

    Reads also the keys of `DCNROIHeads`. With all of them at their defaults it is `CascadeROIHeads`.

    Args:
        average_logits: the score is the softmax of the stages' mean class logits (MODEL.DCN.CASCADE_AVERAGE_LOGITS),
            and not the mean of their probabilities.
        resample: in training, each stage matches and samples anew from the boxes of the stage before and the ground
            truth (CASCADE_RESAMPLE), and does not keep the boxes sampled for the first stage.
        stage_loss_weights: factor of all losses of each stage (CASCADE_LOSS_WEIGHTS).
        scale_gradients: pass 1 / stages of each stage's gradient on to the pooled features (CASCADE_SCALE_GRADIENTS).
        kwargs: arguments of `CascadeROIHeads`. A `MaskHeadPerStage` as mask_head (CASCADE_MASK_HEADS) is trained on
            the samples of all stages, any other on those of the first.
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
                # Without resampling, later stages match boxes that are the first stage's and end with no ground truth.
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
        """Labels and samples with the matcher of `stage`; to resample, it notes which proposals are ground truth."""
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
            kept = ~one_image.is_ground_truth  # those are added again, as they are
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
            return {}  # _stage_losses has them: it knows the samples of each stage
        return super()._forward_mask(features, instances)
