# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Prediction for one image."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import ResizeTransform
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image

from ..checkpoint import DCNCheckpointer
from ..config import check_config
from ..data.images import ImageError, check_input_format, pixels_of
from ..data.transforms import build_augmentation
from .machine import fit_device


class DCNPredictor(DefaultPredictor):
    """Detectron2's `DefaultPredictor` with the images and the resizing of dcn_d2's training and evaluation.

    It resizes with what INPUT.RESIZE_WITH names, where `DefaultPredictor` always takes PIL, knows every INPUT.FORMAT
    that training knows, "L" (grey) too, and refuses what is no image instead of predicting nonsense.

    MODEL.WEIGHTS is read by `DCNCheckpointer`: as data only, converted if it is a file of MMDetection, and refused with
    a list if it does not fit the model. Where there is no GPU it runs on the CPU, as the trainer does.

    Args:
        cfg: of the model, as for `DefaultPredictor`.
        untrained: allows weights that leave heads at their initial values, or none: such a model finds nothing useful.
    """

    def __init__(self, cfg: CfgNode, *, untrained: bool = False) -> None:
        # Not DefaultPredictor's, which takes no INPUT.FORMAT but RGB and BGR, and whose checkpointer runs pickles.
        check_config(cfg)
        check_input_format(cfg)
        self.cfg = cfg.clone()  # this and building the model may change it
        self.cfg.defrost()
        fit_device(self.cfg)
        self.model = build_model(self.cfg).eval()
        if cfg.DATASETS.TEST:
            self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
        checkpointer = DCNCheckpointer(self.model)
        (checkpointer.load if untrained else checkpointer.load_trained)(cfg.MODEL.WEIGHTS)
        (self.aug,) = build_augmentation(cfg, is_train=False)
        self.input_format = cfg.INPUT.FORMAT

    @torch.no_grad()
    def __call__(self, original_image: np.ndarray | Image.Image | str | os.PathLike[str]) -> dict[str, Any]:
        """Gives the model's output for one image.

        Args:
            original_image: (height, width, 3) of uint8 in BGR, as OpenCV reads it; what else it may be, and by which
                rules it is converted, says `dcn_d2.data.images.pixels_of`.

        Raises:
            ImageError: It is no image, or so narrow that nothing is left of it when it is resized.
        """
        pixels = pixels_of(original_image, self.input_format)
        height, width = pixels.shape[:2]
        transform = self.aug.get_transform(pixels)
        if isinstance(transform, ResizeTransform) and not (transform.new_h and transform.new_w):
            size = f"{transform.new_h} x {transform.new_w}"
            raise ImageError(f"an image of {height} x {width} pixels would be resized to {size}: it is too narrow")
        image = torch.as_tensor(transform.apply_image(pixels).astype("float32").transpose(2, 0, 1))
        return self.model([{"image": image, "height": height, "width": width}])[0]
