# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Finds keys that are set although no part of the model reads them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache

from detectron2.config import CfgNode, get_cfg
from detectron2.utils.logger import log_first_n

from ..access import value_of
from ..keys import add_dcn_keys
from ..messages import listed, shorten
from ..rules import DETECTRON2_POOLERS
from .parts import (
    OUR_HEADS,
    Problem,
    find_part,
    heads_with_poolers,
    is_known,
    meta_architecture,
    proposal_generator,
    reads_proposals,
    reads_roi_heads,
    roi_heads,
)


def warn_of_unread_keys(cfg: CfgNode) -> None:
    """Logs which keys have other values than their defaults although nothing reads them, once in a process."""
    for key, reason in unread_keys(cfg):
        message = f"{key} is {shorten(value_of(cfg, key))}, but nothing reads it: {reason}"
        log_first_n(logging.WARNING, message, name=__name__, key="message")


def unread_keys(cfg: CfgNode) -> list[Problem]:
    """Gives the keys that have other values than their defaults although the parts of this model do not read them.

    It is not known what parts read that are neither dcn_d2's nor Detectron2's: their keys are left out.
    """
    defaults = _defaults()
    absent = object()
    return [
        (key, reason)
        for key, reason in _unread(cfg)
        if value_of(cfg, key, absent) not in (absent, value_of(defaults, key))
    ]


@cache
def _defaults() -> CfgNode:
    cfg = get_cfg()
    add_dcn_keys(cfg)
    return cfg


def _unread(cfg: CfgNode) -> Iterator[Problem]:
    """Gives the keys that nothing reads, whatever their values, with the reason."""
    from detectron2.modeling import BACKBONE_REGISTRY

    yield from _unread_by_training(cfg)
    yield from _unread_by_heads(cfg)
    name = cfg.MODEL.BACKBONE.NAME
    if not is_known(find_part(BACKBONE_REGISTRY, name)):
        return
    if not name.startswith("build_dcn_"):
        for key in ("NORM_EVAL", "MEMORY_FORMAT"):
            yield f"MODEL.DCN.{key}", f"MODEL.BACKBONE.NAME is {name!r}, and only those named build_dcn_... read it"
    if not any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE):
        reason = "MODEL.RESNETS.DEFORM_ON_PER_STAGE makes no stage deformable"
        for key in ("MODEL.RESNETS.DEFORM_MODULATED", "MODEL.RESNETS.DEFORM_NUM_GROUPS", "SOLVER.OFFSET_LR_FACTOR"):
            yield key, reason


def _unread_by_training(cfg: CfgNode) -> Iterator[Problem]:
    """Gives the keys of long runs that belong to something that is switched off."""
    if not value_of(cfg, "SOLVER.EMA.ENABLED", False):
        for key in ("DECAY", "WARMUP"):
            yield f"SOLVER.EMA.{key}", "SOLVER.EMA.ENABLED is False"
    if not value_of(cfg, "TEST.BEST_METRIC", ""):
        yield "TEST.BEST_MODE", 'TEST.BEST_METRIC is ""'
    if not value_of(cfg, "TEST.PATIENCE", 0):
        yield "TEST.MIN_DELTA", "TEST.PATIENCE is 0"


def _unread_by_heads(cfg: CfgNode) -> Iterator[Problem]:
    """Gives the keys below MODEL.DCN that neither the RPN nor the RoI heads read."""
    from ...modeling import DCNRPN, DCNCascadeROIHeads, DCNROIHeads

    dcn = _defaults().MODEL.DCN
    of_rpn = [key for key in dcn if key.startswith("RPN_")]
    of_cascade = [key for key in dcn if key.startswith("CASCADE_")]
    of_heads = [key for key in dcn if key.startswith(("ROI_", "POOLER_"))]
    if not is_known(meta_architecture(cfg)):
        return
    architecture = f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}"
    if not reads_proposals(cfg):
        yield from ((f"MODEL.DCN.{key}", f"{architecture}, which has no RPN") for key in of_rpn)
    else:
        generator = cfg.MODEL.PROPOSAL_GENERATOR.NAME
        part = proposal_generator(cfg)
        if generator == "PrecomputedProposals" or is_known(part) and not issubclass(part, DCNRPN):
            reason = f"MODEL.PROPOSAL_GENERATOR.NAME is {generator!r}, and only DCNRPN reads it"
            yield from ((f"MODEL.DCN.{key}", reason) for key in of_rpn)
    if not reads_roi_heads(cfg):
        yield from ((f"MODEL.DCN.{key}", f"{architecture}, which has no RoI heads") for key in of_heads + of_cascade)
        return
    heads = roi_heads(cfg)
    if not is_known(heads):
        return
    name = f"MODEL.ROI_HEADS.NAME is {cfg.MODEL.ROI_HEADS.NAME!r}"
    if not issubclass(heads, DCNROIHeads):
        reason = f"{name}, and only {listed(OUR_HEADS)} read it".replace(" or ", " and ")
        yield from ((f"MODEL.DCN.{key}", reason) for key in of_heads)
    elif all(cfg.MODEL[head].POOLER_TYPE in (*DETECTRON2_POOLERS, "") for head in heads_with_poolers(cfg)):
        poolers = listed(f"MODEL.{head}.POOLER_TYPE" for head in heads_with_poolers(cfg))
        yield "MODEL.DCN.POOLER_FC_DIM", f"no pooler is deformable ({poolers} is Detectron2's)"
    if not issubclass(heads, DCNCascadeROIHeads):
        yield from ((f"MODEL.DCN.{key}", f"{name}, and only DCNCascadeROIHeads reads it") for key in of_cascade)
    elif not cfg.MODEL.MASK_ON:
        yield "MODEL.DCN.CASCADE_MASK_HEADS", "MODEL.MASK_ON is False"
