# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Resizing as MMDetection does it, with OpenCV, where INPUT.RESIZE_WITH asks for it."""

from __future__ import annotations

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation as build_detectron2_augmentation
from PIL import Image

from ..config import with_dcn_keys


class OpenCVResizeTransform(T.ResizeTransform):
    """Resizes with OpenCV: bilinear on the pixels as they are, without the smoothing that PIL does to shrink an image.

    Enlarged images differ from PIL's by a grey level at most, shrunk ones by tens. Segmentations take the nearest
    pixel. Coordinates and arguments are those of `ResizeTransform`.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resizes (h, w) or (h, w, c) pixels; another `interp` than the default is left to `ResizeTransform`."""
        if interp is not None:
            return super().apply_image(img, interp)
        return self._resize(img, cv2.INTER_LINEAR)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Resizes (h, w) labels: each pixel takes the nearest one's."""
        return self._resize(segmentation, cv2.INTER_NEAREST)

    def inverse(self) -> OpenCVResizeTransform:
        """The transform back to the size before."""
        return OpenCVResizeTransform(self.new_h, self.new_w, self.h, self.w, self.interp)

    def _resize(self, pixels: np.ndarray, interpolation: int) -> np.ndarray:
        if pixels.shape[:2] != (self.h, self.w):
            raise ValueError(f"the image is {pixels.shape[:2]} and not {(self.h, self.w)}, (height, width)")
        resized = cv2.resize(np.ascontiguousarray(pixels), (self.new_w, self.new_h), interpolation=interpolation)
        return resized.reshape(self.new_h, self.new_w, *pixels.shape[2:])  # OpenCV drops a single channel


class OpenCVResizeShortestEdge(T.ResizeShortestEdge):
    """`ResizeShortestEdge` with OpenCV and MMDetection's sizes; arguments as there."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draws the length of the shorter edge, as `ResizeShortestEdge` does."""
        if self.is_range:
            size = np.random.randint(self.short_edge_length[0], self.short_edge_length[1] + 1)
        else:
            size = np.random.choice(self.short_edge_length)
        if size == 0:
            return T.NoOpTransform()
        height, width = image.shape[:2]
        return OpenCVResizeTransform(height, width, *self.get_output_shape(height, width, size, self.max_size))

    @staticmethod
    def get_output_shape(oldh: int, oldw: int, short_edge_length: int, max_size: int) -> tuple[int, int]:
        """Gives (height, width): both sides times one factor, and half a pixel rounds up.

        Detectron2 rounds twice, which differs by a pixel for few shapes, extreme ones.
        """
        factor = min(max_size / max(oldh, oldw), short_edge_length / min(oldh, oldw))
        return int(oldh * factor + 0.5), int(oldw * factor + 0.5)


def with_opencv(augmentation: T.Augmentation) -> T.Augmentation:
    """Gives a `ResizeShortestEdge` the way of `OpenCVResizeShortestEdge`; others are left as they are."""
    if type(augmentation) is not T.ResizeShortestEdge:
        return augmentation
    return OpenCVResizeShortestEdge(
        augmentation.short_edge_length,
        augmentation.max_size,
        "range" if augmentation.is_range else "choice",
    )


class FitCanvas(T.Augmentation):
    """Resizes as another augmentation does, and to a smaller size where the image would not fit into a canvas.

    Args:
        resize: the other augmentation.
        height, width: of the canvas.
        transform: resizes an image that does not fit.
    """

    def __init__(
        self, resize: T.Augmentation, height: int, width: int, transform: type[T.ResizeTransform] = T.ResizeTransform
    ) -> None:
        super().__init__()
        self._init({"resize": resize, "height": height, "width": width, "transform": transform})

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Gives the other augmentation's transform, or the one with which the image just fits."""
        chosen = self.resize.get_transform(image)
        h, w = image.shape[:2]
        new_h, new_w = (chosen.new_h, chosen.new_w) if isinstance(chosen, T.ResizeTransform) else (h, w)
        if new_h <= self.height and new_w <= self.width:
            return chosen
        factor = min(self.height / h, self.width / w)
        sides = int(h * factor + 0.5), int(w * factor + 0.5)
        return self.transform(h, w, *sides, Image.Resampling.BILINEAR)


def build_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Builds what Detectron2's function of this name builds, resizing with what INPUT.RESIZE_WITH names.

    Cropping, where the config has it for training, comes first, as in Detectron2's `DatasetMapper`. Other images also
    fit into INPUT.CANVAS_TEST.
    """
    cfg = with_dcn_keys(cfg)
    augmentations = build_detectron2_augmentation(cfg, is_train)
    if is_train and cfg.INPUT.CROP.ENABLED:
        augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    if cfg.INPUT.RESIZE_WITH not in ("PIL", "cv2"):
        raise ValueError(f'INPUT.RESIZE_WITH must be "PIL" or "cv2", got {cfg.INPUT.RESIZE_WITH!r}')
    with_cv2 = cfg.INPUT.RESIZE_WITH == "cv2"
    if with_cv2:
        augmentations = [with_opencv(augmentation) for augmentation in augmentations]
    if is_train or not cfg.INPUT.CANVAS_TEST:
        return augmentations
    transform = OpenCVResizeTransform if with_cv2 else T.ResizeTransform
    height, width = cfg.INPUT.CANVAS_TEST
    return [FitCanvas(augmentation, height, width, transform) for augmentation in augmentations]
