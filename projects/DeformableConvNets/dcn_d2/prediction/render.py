# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Draws what was found on videos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from .draw import display_image, draw_detections
from .records import Categories, instances_of
from .run_folder import Done, read_line
from .sources import Source, stems_of
from .videos import open_video, read_frames, write_video


def render_videos(
    folder: Path, items: Sequence[Source], done: Done, categories: Categories, confidence: float, every: int
) -> None:
    """Writes an MP4 file for each video that was predicted, with the frames that were.

    It is made from what is written, after the last frame: so it is whole, whoever predicted which frames. The video is
    read once more for it.

    Args:
        folder: where the files go, called as `stems_of` says.
        items: all sources.
        done: what was written about them.
        categories: of the model.
        confidence: lowest score that is drawn.
        every: of so many frames one was predicted; the new video runs as fast as the old one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for item, stem in zip(items, stems_of(items)):
        if item.number in done.lengths:
            rate = open_video(item.path).get(cv2.CAP_PROP_FPS) or 25.0
            frames = _draw_frames(item, done, categories, confidence)
            write_video(folder / f"{stem}.mp4", frames, max(rate / every, 1.0))


def _draw_frames(item: Source, done: Done, categories: Categories, confidence: float) -> Iterator[np.ndarray]:
    for frame, pixels in read_frames(item.path, lambda number: (item.number, number) in done.images):
        if pixels is not None:
            found = instances_of(read_line(done.images[item.number, frame]), categories)
            yield draw_detections(display_image(pixels), found[found.scores >= confidence], categories.names)
