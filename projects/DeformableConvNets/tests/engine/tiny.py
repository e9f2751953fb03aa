# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A detector that trains at some 20 iterations a second on one core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..slim import slim_config

TINY = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.RESNETS.NORM", "BN"),
    *("MODEL.RESNETS.DEPTH", 50),
    *("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True]),
    *("MODEL.RESNETS.DEFORM_MODULATED", True),
    *("MODEL.FPN.OUT_CHANNELS", 8),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 1),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 8),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 50),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 20),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    *("DATASETS.TRAIN", ("nuclei_train",)),
    *("DATASETS.TEST", ()),
    *("DATALOADER.NUM_WORKERS", 0),
    *("INPUT.MIN_SIZE_TRAIN", (64,)),
    *("SOLVER.IMS_PER_BATCH", 1),
    *("SOLVER.MAX_ITER", 4),
    *("SOLVER.STEPS", ()),
    *("SOLVER.WARMUP_ITERS", 0),
    *("SEED", 1),
]


def tiny_config(folder: Path, *others: Any) -> CfgNode:
    """A config that trains in `folder`, with KEY VALUE pairs of its own."""
    cfg = slim_config()
    cfg.merge_from_list([*TINY, "OUTPUT_DIR", str(folder), *others])
    return cfg
