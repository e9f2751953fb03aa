# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Prediction for one image."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeTransform
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image

from ..checkpoint import DCNCheckpointer
from ..config import check_config
from ..data.images import ImageError, check_input_format, pixels_of
from ..data.own import register_own_data
from ..data.transforms import build_augmentation
from .class_names import metadata_of
from .machine import fit_device


class DCNPredictor(DefaultPredictor):
    """Detectron2's `DefaultPredictor`, which reads and resizes images as dcn_d2's training and evaluation do.

    - Images are resized with the library that INPUT.RESIZE_WITH names; `DefaultPredictor` always takes PIL.
    - INPUT.FORMAT may be any that training knows, also "L" (grey).
    - An input that is not an image is refused.
    - `DCNCheckpointer` reads MODEL.WEIGHTS: as data only. It converts files of MMDetection, and refuses weights that do
      not fit the model, with a list.
    - `class_names` are those that the config (DATASETS.CLASS_NAMES) or the weights say, [] if they say none. `metadata`
      has them too, also where the data are not.
    - Without a GPU it runs on the CPU, as the trainer does.

    Args:
        cfg: of the model, as for `DefaultPredictor`.
        untrained: allows weights that leave heads at their initial values, or no weights. Such a model does not find
            anything useful.
    """

    def __init__(self, cfg: CfgNode, *, untrained: bool = False) -> None:
        # DefaultPredictor's __init__ is not called: it takes only RGB and BGR, and its checkpointer runs pickled code.
        check_config(cfg)
        register_own_data(cfg)
        check_input_format(cfg)
        self.cfg = cfg.clone()  # the next lines and building the model may change it
        self.cfg.defrost()
        fit_device(self.cfg)
        self.model = build_model(self.cfg).eval()
        checkpointer = DCNCheckpointer(self.model, class_names=cfg.DATASETS.get("CLASS_NAMES", ()))
        (checkpointer.load if untrained else checkpointer.load_trained)(cfg.MODEL.WEIGHTS)
        self.class_names = list(cfg.DATASETS.get("CLASS_NAMES", ())) or list(checkpointer.trained_names)
        self.metadata = metadata_of(cfg, self.class_names)
        (self.aug,) = build_augmentation(cfg, is_train=False)
        self.input_format = cfg.INPUT.FORMAT

    @torch.no_grad()
    def __call__(self, original_image: np.ndarray | Image.Image | str | os.PathLike[str]) -> dict[str, Any]:
        """Gives the model's output for one image.

        Args:
            original_image: (height, width, 3) of uint8 in BGR, as OpenCV reads it. `dcn_d2.data.images.pixels_of`
                says what else it may be, and how that is converted.

        Raises:
            ImageError: It is not an image, or it is so narrow that resizing leaves no pixel.
        """
        pixels = pixels_of(original_image, self.input_format)
        height, width = pixels.shape[:2]
        transform = self.aug.get_transform(pixels)
        if isinstance(transform, ResizeTransform) and not (transform.new_h and transform.new_w):
            size = f"{transform.new_h} x {transform.new_w}"
            raise ImageError(f"an image of {height} x {width} pixels would be resized to {size}: it is too narrow")
        image = torch.as_tensor(transform.apply_image(pixels).astype("float32").transpose(2, 0, 1))
        return self.model([{"image": image, "height": height, "width": width}])[0]
