# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Draws boxes, classes, scores and masks. OpenCV and Detectron2 are imported when something is drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..outputs import plain_label

if TYPE_CHECKING:
    from detectron2.structures import Instances
    from PIL import Image

DETECTION_COLOR = (1.0, 0.75, 0.2)


def display_image(image_bgr: np.ndarray, stretch_contrast: bool = False) -> np.ndarray:
    """Gives RGB, for the eye only; with a stretched contrast colours keep their tone."""
    from PIL import Image, ImageOps

    image = Image.fromarray(image_bgr[:, :, ::-1].copy())
    if stretch_contrast:
        image = ImageOps.autocontrast(image, cutoff=(1, 0.5), preserve_tone=True)
    return np.asarray(image)


def enlarge(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes an image so that its longer side has ``size`` pixels, and the other one at least one."""
    import cv2

    height, width = (max(1, round(side * size / max(image.shape[:2]))) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)


def draw_boxes(image: np.ndarray, boxes: Any, color: Any, labels: list[str] | None = None, masks: Any = None) -> Any:
    """Draws (x0, y0, x1, y1) boxes in pixels of `image` on a copy of it, all in one colour."""
    from detectron2.utils.visualizer import Visualizer

    colors = [color] * len(boxes)
    if labels is not None:
        labels = [plain_label(label) for label in labels]
    drawn = Visualizer(image).overlay_instances(boxes=boxes, masks=masks, labels=labels, assigned_colors=colors)
    return drawn.get_image()


def resize_mask(mask: np.ndarray, expected: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Gives a mask, whose (height, width) must be ``expected``, another ``size``."""
    import cv2

    if mask.shape != expected:
        raise ValueError(f"the mask is {mask.shape} and not {expected}, (height, width)")
    return cv2.resize(mask.astype("uint8"), size[::-1], interpolation=cv2.INTER_NEAREST)


def draw_detections(image: np.ndarray, found: Instances, names: list[str]) -> np.ndarray:
    """Draws boxes with classes and scores, and masks where there are any; `found` may be of another resolution."""
    scale = np.divide(image.shape[1::-1], found.image_size[::-1])
    classes, scores = found.pred_classes.tolist(), found.scores.tolist()
    labels = [f"{names[index]} {score:.0%}" for index, score in zip(classes, scores)]
    masks = None
    if found.has("pred_masks"):
        masks = [resize_mask(mask, found.image_size, image.shape[:2]) for mask in found.pred_masks.numpy()]
    boxes = found.pred_boxes.tensor.numpy() * np.tile(scale, 2)
    return draw_boxes(image, boxes, DETECTION_COLOR, labels, masks)


def compose(columns: list[list[np.ndarray]], titles: list[str]) -> Image.Image:
    """Makes one picture of titled columns of panels, all panels of one size."""
    from PIL import Image, ImageDraw, ImageFont

    gap, bar, font, (height, width) = 12, 34, ImageFont.load_default(18), columns[0][0].shape[:2]
    width = max(width, *(math.ceil(font.getlength(title)) for title in titles))
    rows = max(len(column) for column in columns)
    picture = Image.new("RGB", (len(columns) * (width + gap) + gap, bar + rows * (height + gap)), "white")
    for i, (column, title) in enumerate(zip(columns, titles, strict=True)):
        left = gap + i * (width + gap)
        ImageDraw.Draw(picture).text((left, bar / 2), title, "black", font, anchor="lm")
        for j, panel in enumerate(column):
            picture.paste(Image.fromarray(panel), (left, bar + j * (height + gap)))
    return picture
