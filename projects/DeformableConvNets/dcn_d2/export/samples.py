# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Images with which an exported file is compared with its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode

from ..config import with_dcn_keys
from ..data.images import pixels_of
from ..data.nuclei import SCALE, SOURCE_DIR, SPLITS
from ..data.transforms import build_augmentation
from .description import Description
from .shapes import round_up

# What canvases hold beside their images; it must not matter.
FILLED_WITH = 200.0


@dataclass(frozen=True)
class Batch:
    """Images at the top left of canvases, as an exported graph takes them.

    Attributes:
        canvases: (N, C, H, W) of float32.
        sizes: height and width of each image in its canvas.
        originals: height and width of each image before it was resized.
    """

    canvases: np.ndarray
    sizes: list[tuple[int, int]]
    originals: list[tuple[int, int]]

    def inputs(self, description: Description) -> dict[str, np.ndarray]:
        """What the graph is given. Masks are pasted into an image of the first one's original size."""
        inputs = {"images": self.canvases, "image_sizes": np.array(self.sizes, dtype=np.int64)}
        if description.masks == "pasted":
            inputs["output_size"] = np.array(self.originals[0], dtype=np.int64)
        return inputs


def open_image(image: Any, format: str) -> np.ndarray:
    """Gives the pixels (h, w, c) of an image; None stands for a picture of nuclei that dcn_d2 has with it."""
    if image is not None:
        return pixels_of(image, format)
    held_out = SPLITS["val"]
    grey = cv2.imread(str(SOURCE_DIR / "image.png"), cv2.IMREAD_GRAYSCALE)
    if grey is None:
        raise FileNotFoundError(f"{SOURCE_DIR / 'image.png'} cannot be read; reinstall dcn_d2")
    tile = grey[: held_out.tile[0], held_out.columns[0] : held_out.columns[1]]
    tile = cv2.resize(tile, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_CUBIC)
    return pixels_of(tile, format)


def batches_of(pixels: np.ndarray, cfg: CfgNode, description: Description) -> list[Batch]:
    """Makes batches of an image and of a mirrored part of it, in as many sizes of batches and canvases as there may be.

    Args:
        pixels: (h, w, c) of the image.
        cfg: of the model; says how images are resized.
        description: of the exported file.
    """
    height = pixels.shape[0]
    images = [pixels, np.ascontiguousarray(pixels[: max(height * 3 // 4, 1), ::-1])]
    resized = [resize(image, cfg, description.size) for image in images]
    if description.batch is not None:
        groups = [[number % 2 for number in range(description.batch)]]
        groups += [[1]] if description.batch == 1 else []
    else:
        groups = [[0], [0, 1]]
    return [
        Batch(
            _canvases([resized[number] for number in group], description),
            [resized[number].shape[:2] for number in group],
            [images[number].shape[:2] for number in group],
        )
        for group in groups
    ]


def resize(pixels: np.ndarray, cfg: CfgNode, size: tuple[int, int] | None) -> np.ndarray:
    """Resizes an image as a prediction does; with a `size` (height, width), so that it also fits in there."""
    cfg = with_dcn_keys(cfg).clone()
    cfg.defrost()
    cfg.INPUT.CANVAS_TEST = size or ()
    (augmentation,) = build_augmentation(cfg, is_train=False)
    return augmentation.get_transform(pixels).apply_image(pixels)


def _canvases(images: list[np.ndarray], description: Description) -> np.ndarray:
    """Puts images (h, w, c) at the top left of canvases (N, C, H, W)."""
    unit = description.size_divisibility
    height, width = description.size or (
        round_up(max(image.shape[0] for image in images), unit),
        round_up(max(image.shape[1] for image in images), unit),
    )
    canvases = np.full((len(images), images[0].shape[2], height, width), FILLED_WITH, dtype=np.float32)
    for canvas, image in zip(canvases, images):
        canvas[:, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
    return canvases
