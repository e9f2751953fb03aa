# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Checks that the images of a data set exist and have the sizes that the annotations say. Reads only their headers."""

from __future__ import annotations

import os
import random
import re
import stat
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from PIL import Image

from .findings import Findings, show
from .images import fault_of

ALL = 2000  # up to this many images, each one is looked at
SAMPLE = 200  # of more images, this many are looked at, always the same ones
_REMOTE = re.compile(r"\w+://")
_ORIENTATION = 0x0112  # EXIF: how a camera was held


class ImageFault(NamedTuple):
    """Why an image cannot be used."""

    kind: str  # a short name
    text: str  # in words, to follow the file's name


def check_image_files(records: Sequence[dict[str, Any]], findings: Findings) -> int:
    """Looks at the images of records in Detectron2's format; images elsewhere than on this machine are left out.

    Returns:
        How many it looked at.
    """
    local = [index for index, record in enumerate(records) if not is_remote(record)]
    if len(local) > ALL:
        local = sorted(random.Random(0).sample(local, SAMPLE))
    faults = {index: fault for index in local if (fault := find_fault(records[index]))}
    looked = [records[index] for index in local]
    findings.count(
        faults,
        looked,
        "images that were looked at cannot be used",
        lambda index: f"{show(records[index]['file_name'])}: {faults[index].text}",
        kind="image-files",
    )
    return len(looked)


def is_remote(record: dict[str, Any]) -> bool:
    """True if the image of a record is not a file of this machine."""
    return bool(_REMOTE.match(str(record["file_name"])))


def find_fault(record: dict[str, Any], look: Callable[[Image.Image], object] | None = None) -> ImageFault | None:
    """What is wrong with the image of a record, from its header.

    Args:
        record: with file_name, and the width and height that the annotations say.
        look: is called with the opened image before its size is compared. A ValueError or OSError of it means that
            the image cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(record["file_name"]).st_mode):  # a pipe or a device may block for ever
            return ImageFault("image-unreadable", "is not a file")
        with Image.open(record["file_name"]) as image:
            if fault := fault_of(image):
                return ImageFault("image-refused", fault)
            stored = image.size
            turned = is_turned(image)
            sizes = {stored[::-1] if turned else stored}
            if turned and image.format == "TIFF":  # depends on the version of Pillow
                sizes.add(stored)
            if look:
                look(image)
    except FileNotFoundError:
        return ImageFault("image-missing", "does not exist")
    except Image.DecompressionBombError as error:
        return ImageFault("image-unreadable", f"is too large: {error}")
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for damaged files
        reason = "not in a format that Pillow knows"
        if not isinstance(error, Image.UnidentifiedImageError):
            reason = show(getattr(error, "strerror", None) or error)  # strerror says it without the file's name
        return ImageFault("image-unreadable", f"cannot be read: {reason}")
    return _compare_size(record, stored, turned, sizes)


def _compare_size(
    record: dict[str, Any], stored: tuple[int, int], turned: bool, sizes: set[tuple[int, int]]
) -> ImageFault | None:
    expected = record.get("width"), record.get("height")
    if None in expected or expected in sizes:
        return None
    width, height = next(iter(sizes))
    exif = f" (stored as {stored[0]} x {stored[1]}, and its EXIF data say how to turn it)" if turned else ""
    text = f"is {width} x {height} pixels{exif}, but the annotations say width x height = {expected[0]} x {expected[1]}"
    return ImageFault("image-size-before-rotation" if turned and expected == stored else "image-size", text)


def is_turned(image: Image.Image) -> bool:
    """True if width and height change places when the image is displayed, which is how Detectron2 reads it."""
    return orientation_of(image) in (5, 6, 7, 8)


def orientation_of(image: Image.Image) -> int:
    """EXIF's number for how an image is turned to be displayed, which is how Detectron2 reads it; 1 is not at all."""
    if image.format == "PNG" and "exif" not in image.info:  # getexif would read all pixels to look behind them
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data raise errors of many kinds; Detectron2 ignores such data as well
        return 1
    return value if value in range(1, 9) else 1
