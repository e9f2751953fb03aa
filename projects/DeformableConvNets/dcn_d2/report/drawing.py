# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Draws the mistakes in an image: the ground truth on the left, what the model found on the right."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from ..outputs import plain_label
from .mistakes import ImageMistakes

GOOD, MISSED, WRONG = (0.35, 0.85, 0.55), (1.0, 0.72, 0.1), (1.0, 0.3, 0.25)
PANEL = 480  # pixels of a panel's longer side
MOST_LABELS = 25  # more names hide what they name


def draw_mistakes(image: np.ndarray, done: COCOeval, mistakes: ImageMistakes) -> bytes:
    """Gives a JPEG.

    Args:
        image: (height, width, 3) of uint8 in RGB.
        done: the evaluation in which the mistakes were made.
        mistakes: what to draw.
    """
    from PIL import Image

    height, width = image.shape[:2]
    scale = PANEL / max(height, width)
    small = Image.fromarray(image).resize((max(1, round(width * scale)), max(1, round(height * scale))))
    names = {category: str(entry.get("name", category)) for category, entry in done.cocoGt.cats.items()}
    several = len(done.params.catIds) > 1

    def label(entry: dict[str, Any]) -> str:
        words = [names.get(entry["category_id"], "?")] if several else []
        return " ".join([*words, *([f"{entry['score']:.0%}"] if "score" in entry else [])])

    def panel(groups: list[tuple[list[dict[str, Any]], Any]]) -> np.ndarray:
        boxes = [entry["bbox"] for entries, _ in groups for entry in entries]
        colors = [color for entries, color in groups for _ in entries]
        labels = [label(entry) for entries, _ in groups for entry in entries]
        return _draw_boxes(np.asarray(small), np.array(boxes, dtype=float).reshape(-1, 4) * scale, labels, colors)

    truth, found = done.cocoGt.anns, done.cocoDt.anns
    left = panel([([truth[i] for i in mistakes.found], GOOD), ([truth[i] for i in mistakes.missed], MISSED)])
    right = panel([([found[i] for i in mistakes.right], GOOD), ([found[i] for i in mistakes.wrong], WRONG)])
    both = np.concatenate([left, np.full((left.shape[0], 6, 3), 128, np.uint8), right], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(both).save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def _draw_boxes(image: np.ndarray, boxes: np.ndarray, labels: list[str], colors: list[Any]) -> np.ndarray:
    """Draws (x, y, width, height) boxes."""
    from detectron2.utils.visualizer import Visualizer

    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    shown = [plain_label(name) for name in labels]
    show = any(shown) and len(shown) <= MOST_LABELS
    pen = Visualizer(image, scale=1.0)
    pen.overlay_instances(boxes=corners, labels=shown if show else None, assigned_colors=colors, alpha=0.9)
    return pen.output.get_image()
