# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the model of a config predicts, as far as its config says it."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import (
    FCOS,
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    PanopticFPN,
    ProposalNetwork,
    RetinaNet,
    SemanticSegmentor,
)

# The names of outputs in messages.
BOXES, MASKS, KEYPOINTS = "boxes of objects", "masks of objects", "keypoints"
PROPOSALS, SEMANTIC, PANOPTIC = "proposals", "a semantic segmentation", "a panoptic segmentation"


def outputs_of(cfg: CfgNode) -> set[str] | None:
    """Gives what the model predicts; None if it is not known, because the architecture is not Detectron2's."""
    name, model = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL
    kind = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    if kind is SemanticSegmentor:
        return {SEMANTIC}
    if kind is ProposalNetwork:
        return {PROPOSALS}
    if kind in (RetinaNet, FCOS):
        return {BOXES}
    objects = {BOXES} | ({MASKS} if model.MASK_ON else set()) | ({KEYPOINTS} if model.KEYPOINT_ON else set())
    if kind is GeneralizedRCNN:
        return objects
    if kind is PanopticFPN:
        return objects | {SEMANTIC} | ({PANOPTIC} if model.PANOPTIC_FPN.COMBINE.ENABLED else set())
    return None
