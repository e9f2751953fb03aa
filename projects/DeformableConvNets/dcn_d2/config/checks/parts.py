# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Which parts a model has by its config, as far as that is known here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

Problem = tuple[str, str]  # a key, and a sentence that begins with it
Check = Callable[[CfgNode], Iterator[Problem]]  # may assume that each value by itself is right

RESNET_BUILDERS = ("build_resnet_backbone", "build_dcn_resnet_backbone")
FPN_BUILDERS = ("build_resnet_fpn_backbone", "build_dcn_resnet_fpn_backbone")
RETINANET_BUILDERS = ("build_retinanet_resnet_fpn_backbone", "build_dcn_retinanet_resnet_fpn_backbone")
OUR_HEADS = ("DCNROIHeads", "DCNCascadeROIHeads")


def find_part(registry: Registry, name: str) -> Any:
    """Gives what is registered under a name, or None."""
    return registry.get(name) if name in registry else None


def is_known(part: Any) -> bool:
    """Whether a part is Detectron2's or dcn_d2's. It is not known which keys other parts read."""
    return getattr(part, "__module__", "").startswith(("detectron2.", "dcn_d2."))


def is_kind_of(part: Any, *kinds: type) -> bool:
    """Whether a part is a class derived from one of `kinds`; a registry may also hold functions."""
    return isinstance(part, type) and issubclass(part, kinds)


def meta_architecture(cfg: CfgNode) -> Any:
    """Gives the class of the whole model, or None."""
    from detectron2.modeling import META_ARCH_REGISTRY

    return find_part(META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE)


def proposal_generator(cfg: CfgNode) -> Any:
    """Gives what MODEL.PROPOSAL_GENERATOR.NAME names, or None."""
    from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY

    return find_part(PROPOSAL_GENERATOR_REGISTRY, cfg.MODEL.PROPOSAL_GENERATOR.NAME)


def roi_heads(cfg: CfgNode) -> Any:
    """Gives what MODEL.ROI_HEADS.NAME names, or None."""
    from detectron2.modeling import ROI_HEADS_REGISTRY

    return find_part(ROI_HEADS_REGISTRY, cfg.MODEL.ROI_HEADS.NAME)


def reads_proposals(cfg: CfgNode) -> bool:
    """Whether the model has a proposal generator."""
    from detectron2.modeling import GeneralizedRCNN, ProposalNetwork

    return is_kind_of(meta_architecture(cfg), GeneralizedRCNN, ProposalNetwork)


def has_rpn(cfg: CfgNode) -> bool:
    """Whether the model has a region proposal network."""
    from detectron2.modeling.proposal_generator import RPN

    return reads_proposals(cfg) and is_kind_of(proposal_generator(cfg), RPN)


def reads_roi_heads(cfg: CfgNode) -> bool:
    """Whether the model has RoI heads."""
    from detectron2.modeling import GeneralizedRCNN

    return is_kind_of(meta_architecture(cfg), GeneralizedRCNN)


def has_standard_heads(cfg: CfgNode) -> bool:
    """Whether the model has RoI heads that are Detectron2's `StandardROIHeads` or derived from them."""
    from detectron2.modeling import StandardROIHeads

    return reads_roi_heads(cfg) and is_kind_of(roi_heads(cfg), StandardROIHeads)


def is_retinanet(cfg: CfgNode) -> bool:
    """Whether the model is a RetinaNet."""
    from detectron2.modeling import RetinaNet

    return is_kind_of(meta_architecture(cfg), RetinaNet)


def heads_with_poolers(cfg: CfgNode) -> list[str]:
    """Gives the nodes below MODEL of the heads that standard RoI heads have."""
    model = cfg.MODEL
    return [
        "ROI_BOX_HEAD",
        *(["ROI_MASK_HEAD"] if model.MASK_ON else []),
        *(["ROI_KEYPOINT_HEAD"] if model.KEYPOINT_ON else []),
    ]
