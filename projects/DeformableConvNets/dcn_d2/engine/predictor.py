# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Prediction for one image."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor

from ..checkpoint import DCNCheckpointer
from ..data.transforms import build_augmentation


class DCNPredictor(DefaultPredictor):
    """Detectron2's `DefaultPredictor`, which resizes images with what INPUT.RESIZE_WITH names.

    `DefaultPredictor` itself always resizes with PIL: on enlarged images that changes grey levels by 1 at most.

    MODEL.WEIGHTS is read by `DCNCheckpointer`: as data only, converted if it is a file of MMDetection, and refused with
    a list if it does not fit the model.

    Args:
        cfg: of the model, as for `DefaultPredictor`.
        untrained: allows weights that leave heads at their initial values, or none: such a model finds nothing useful.
    """

    def __init__(self, cfg: CfgNode, *, untrained: bool = False) -> None:
        without_weights = cfg.clone()
        without_weights.defrost()
        without_weights.MODEL.WEIGHTS = ""  # DefaultPredictor's checkpointer runs pickles, and loads what fits
        super().__init__(without_weights)
        self.cfg = cfg.clone()
        checkpointer = DCNCheckpointer(self.model)
        (checkpointer.load if untrained else checkpointer.load_trained)(cfg.MODEL.WEIGHTS)
        (self.aug,) = build_augmentation(cfg, is_train=False)
