# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Reads videos with OpenCV, frame by frame, and writes them with what was found drawn on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    import numpy as np


class VideoError(ValueError):
    """A video that cannot be read or written; the message says which, and why."""


def open_video(path: str) -> Any:
    """Opens a video; gives OpenCV's `VideoCapture`."""
    import cv2

    if not os.path.isfile(path):
        raise VideoError(f"{path}: No such file")
    try:
        video = cv2.VideoCapture(path)
    except (UnicodeError, cv2.error) as error:
        raise VideoError(f"{path} cannot be read by OpenCV: {error}") from error
    if not video.isOpened():
        raise VideoError(f"{path} is not a video that OpenCV can read")
    return video


def estimate_frames(path: str) -> int:
    """Gives the number of frames that a video's header tells, which may be wrong; 0 if it cannot be read."""
    import cv2

    try:
        return max(0, int(open_video(path).get(cv2.CAP_PROP_FRAME_COUNT)))
    except VideoError:
        return 0


def read_frames(path: str, wanted: Callable[[int], bool]) -> Iterator[tuple[int, np.ndarray | None]]:
    """Gives number and BGR pixels of frames, and at the end the number of all frames with None.

    Args:
        path: of the video.
        wanted: says for the number of a frame, from 0, whether its pixels are needed.

    Raises:
        VideoError: It cannot be opened, or has no frames.
    """
    video = open_video(path)
    try:
        number = 0
        while video.grab():
            if wanted(number):
                whole, pixels = video.retrieve()
                if not whole:
                    break
                yield number, pixels
            number += 1
    finally:
        video.release()
    if not number:
        raise VideoError(f"{path} has no frames that OpenCV can read")
    yield number, None


def write_video(path: Path, frames: Iterator[np.ndarray], rate: float) -> int:
    """Writes an MP4 file, whole or not at all, and gives the number of its frames.

    Args:
        path: the file; it is replaced if it exists.
        frames: RGB pixels, all of one size.
        rate: frames a second.
    """
    import cv2

    part = path.with_name(f".{uuid4().hex}.part.mp4")
    writer, number = None, 0
    try:
        for pixels in frames:
            if writer is None:
                size = pixels.shape[1], pixels.shape[0]
                writer = cv2.VideoWriter(str(part), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
                if not writer.isOpened():
                    raise VideoError(f"OpenCV cannot write {path}")
            writer.write(pixels[:, :, ::-1].copy())
            number += 1
        if writer is not None:
            writer.release()
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return number
