# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Checks that the parts that a config names are registered."""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.config import CfgNode

from ..access import value_of
from ..messages import listed, nearest, shorten
from .parts import Problem, has_standard_heads, heads_with_poolers, reads_proposals, reads_roi_heads


def check_names(cfg: CfgNode) -> Iterator[Problem]:
    """The names of all parts that the model has must be registered."""
    import detectron2.modeling as modeling
    from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
    from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY
    from detectron2.modeling.roi_heads.box_head import ROI_BOX_HEAD_REGISTRY
    from detectron2.modeling.roi_heads.keypoint_head import ROI_KEYPOINT_HEAD_REGISTRY
    from detectron2.modeling.roi_heads.mask_head import ROI_MASK_HEAD_REGISTRY

    named = {
        "MODEL.META_ARCHITECTURE": modeling.META_ARCH_REGISTRY,
        "MODEL.BACKBONE.NAME": modeling.BACKBONE_REGISTRY,
    }
    if reads_proposals(cfg):
        named["MODEL.PROPOSAL_GENERATOR.NAME"] = modeling.PROPOSAL_GENERATOR_REGISTRY
        if cfg.MODEL.PROPOSAL_GENERATOR.NAME != "PrecomputedProposals":
            named["MODEL.RPN.HEAD_NAME"] = RPN_HEAD_REGISTRY
            named["MODEL.ANCHOR_GENERATOR.NAME"] = ANCHOR_GENERATOR_REGISTRY
    if reads_roi_heads(cfg):
        named["MODEL.ROI_HEADS.NAME"] = modeling.ROI_HEADS_REGISTRY
    if has_standard_heads(cfg):
        registries = (ROI_BOX_HEAD_REGISTRY, ROI_MASK_HEAD_REGISTRY, ROI_KEYPOINT_HEAD_REGISTRY)
        for head, registry in zip(("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD"), registries):
            if head in heads_with_poolers(cfg):
                named[f"MODEL.{head}.NAME"] = registry
    for key, registry in named.items():
        name = value_of(cfg, key)
        if name in registry or (key == "MODEL.PROPOSAL_GENERATOR.NAME" and name == "PrecomputedProposals"):
            continue
        known = sorted(known for known, _ in registry)
        yield (
            key,
            f"{key} must be {listed(known)}{nearest(name, known)}, got {shorten(name)} (a package of your own "
            "must be imported before the config is checked)",
        )
