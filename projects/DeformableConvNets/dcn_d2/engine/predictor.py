# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Prediction for one image."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor

from ..data.transforms import build_augmentation


class DCNPredictor(DefaultPredictor):
    """Detectron2's `DefaultPredictor`, which resizes images with what INPUT.RESIZE_WITH names.

    `DefaultPredictor` itself always resizes with PIL: on enlarged images that changes grey levels by 1 at most.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        (self.aug,) = build_augmentation(cfg, is_train=False)
