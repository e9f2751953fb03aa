# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Draws recorded samples on an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .record import SamplingRecord, Size, TracedLayer, trace_samples

ImageLike = TypeVar("ImageLike", np.ndarray, Image.Image)
Color = tuple[int, int, int]
Window = tuple[float, float, float, float]


class SamplingAnnotator:
    """Draws the locations that lead to a point, one colour for each layer, on a copy of an image.

    Size and opacity of a dot show its modulation relative to the strongest of its layer. Radii and text scale with
    the image. To draw several points, pass the result back in with the next one.

    Args:
        depth: how many deformable layers to follow back.
        colors: RGB, the last layer first; repeated if there are more layers.
        radius: of the last layer's dots in pixels, chosen by the image's size if None.
        label: whether to write the layers' names and numbers of samples.
        group: which deform group's samples to show.
    """

    def __init__(
        self,
        depth: int = 3,
        colors: Sequence[Color] = ((255, 209, 102), (239, 71, 111), (76, 201, 240)),
        radius: float | None = None,
        label: bool = True,
        group: int = 0,
    ) -> None:
        if depth < 1 or not colors:
            raise ValueError(f"depth must be at least 1 and colors not empty, got {depth} and {colors}")
        if radius is not None and not 0 <= radius < math.inf:
            raise ValueError(f"radius must be finite and not negative, got {radius}")
        self.depth, self.colors, self.radius, self.label, self.group = depth, tuple(colors), radius, label, group

    def __call__(
        self,
        image: ImageLike,
        record: SamplingRecord,
        point: tuple[float, float],
        layer: str | None = None,
        window: Window | None = None,
        index: int = 0,
    ) -> ImageLike:
        """Gives an image of the same kind and size.

        Args:
            image: (H, W, 3) uint8 RGB array or PIL image: what the network saw, at any resolution.
            record: of a forward pass, see `record_sampling`.
            point: (y, x) in pixels of ``image``.
            layer: where the point lies, by parts of its name; the last layer by default.
            window: the part (y0, x0, y1, x1) of the network's image that ``image`` shows; all of it by default.
            index: which image of the batch.
        """
        if isinstance(image, Image.Image):
            if image.mode[0] in "IF":
                raise ValueError(f"image must have 8 bits a channel, got one of the mode {image.mode}")
            drawn = self(np.asarray(image.convert("RGB")), record, point, layer, window, index)
            return Image.fromarray(drawn).convert(image.mode)
        if not isinstance(image, np.ndarray):
            raise TypeError(f"image must be a numpy array or a PIL image, got {type(image).__name__}")
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ValueError(f"image must be (H, W, 3) of uint8, got {image.shape} of {image.dtype}")
        if window is None:
            if not 0 <= index < len(record.image_sizes):
                raise IndexError(f"index is {index}, but the record is of {len(record.image_sizes)} images")
            window = (0, 0, *record.image_sizes[index])
        if not (window[0] < window[2] and window[1] < window[3]):  # False for NaN too
            raise ValueError(f"window must be (y0, x0, y1, x1) with an area, got {window}")
        origin = np.array(window[:2])
        scale = np.array(image.shape[:2]) / (np.array(window[2:]) - origin)
        # Scaling keeps the corner of the image in place. The centre of its first pixel is half a pixel off.
        network_point = (np.array(point) + 0.5) / scale + origin - 0.5
        traced = trace_samples(record, (network_point[0], network_point[1]), layer, self.depth, index, self.group)
        radius = self.radius or max(2.0, min(image.shape[:2]) / 110)
        canvas = image.astype(np.float32)
        for level in reversed(range(len(traced))):
            positions = (traced[level].positions + 0.5 - origin) * scale - 0.5
            dots = _dots(image.shape[:2], positions, traced[level].weights, radius * 0.72**level)
            for color, strength in (((0, 0, 0), dots[0] * 0.7), (self.colors[level % len(self.colors)], dots[1])):
                canvas += (np.array(color, dtype=np.float32) - canvas) * strength[..., None]
        result = canvas.round().astype(np.uint8)
        _cross(result, point, radius)
        below = point[0] < image.shape[0] / 2
        return self._write_label(result, traced, below) if self.label else result

    def _write_label(self, image: np.ndarray, traced: Sequence[TracedLayer], below: bool) -> np.ndarray:
        """Writes one line for each layer, with its colour's dot, into the left corner that is away from the point."""
        size = max(11, round(min(image.shape[:2]) / 32))
        lines = [f"{_short(layer.name)}: {len(layer.positions)} samples" for layer in traced]
        picture = Image.fromarray(image)
        pen = ImageDraw.Draw(picture, "RGBA")
        font = ImageFont.load_default(size)
        step, pad = round(size * 1.35), size // 2
        width = max(pen.textlength(line, font=font) for line in lines) + 3 * pad + size // 2
        height = step * len(lines) + 2 * pad
        top = image.shape[0] - height if below else 0
        pen.rectangle((0, top, width, top + height), fill=(0, 0, 0, 150))
        for level, line in enumerate(lines):
            middle = top + pad + step * (level + 0.5)
            r = size * 0.28 * 0.9**level
            pen.ellipse((pad, middle - r, pad + 2 * r, middle + r), fill=self.colors[level % len(self.colors)])
            pen.text((2 * pad + size // 2, middle), line, font=font, fill=(255, 255, 255), anchor="lm")
        return np.asarray(picture)


def _dots(size: Size, positions: np.ndarray, weights: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Gives the opacities, in [0, 1], of a dark rim and of the dots themselves."""
    rim, dots = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    relative = weights / max(weights.max(initial=0), 1e-12)
    for i in np.argsort(relative):  # the strongest are drawn last, over weaker ones
        # OpenCV takes fractions of a pixel as whole numbers of 1/16.
        y, x = (round(float(value) * 16) for value in positions[i].clip(-1e4, 1e4))
        r, opacity = radius * (0.55 + 0.45 * relative[i]), 0.25 + 0.75 * relative[i]
        cv2.circle(rim, (x, y), round((r + 0.4 * radius) * 16), 255 * opacity, -1, cv2.LINE_AA, 4)
        cv2.circle(dots, (x, y), round(r * 16), 255 * opacity, -1, cv2.LINE_AA, 4)
    return rim.astype(np.float32) / 255, dots.astype(np.float32) / 255


def _cross(image: np.ndarray, point: tuple[float, float], radius: float) -> None:
    center = (round(point[1]), round(point[0]))
    for color, thickness in (((0, 0, 0), 5), ((255, 255, 255), 2)):
        width = max(1, round(thickness * radius / 5))
        cv2.drawMarker(image, center, color, cv2.MARKER_CROSS, round(5 * radius), width, cv2.LINE_AA)


def _short(name: str) -> str:
    """Leaves out of a layer's name what all layers of a backbone have in theirs."""
    return ".".join(part for part in name.split(".") if part not in ("backbone", "bottom_up", "conv2")) or name
