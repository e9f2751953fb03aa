# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Checks that the images of a data set exist and have the sizes that the annotations say. Reads only their headers."""

from __future__ import annotations

import os
import random
import re
import stat
from collections.abc import Sequence
from typing import Any

from PIL import Image

from .findings import Findings, show
from .images import fault_of

ALL = 2000  # up to this many images, each one is looked at
SAMPLE = 200  # of more images, this many are looked at, always the same ones
_REMOTE = re.compile(r"\w+://")
_ORIENTATION = 0x0112  # EXIF: how a camera was held


def check_image_files(records: Sequence[dict[str, Any]], findings: Findings) -> int:
    """Looks at the images of records in Detectron2's format; images elsewhere than on this machine are left out.

    Returns:
        How many it looked at.
    """
    local = [index for index, record in enumerate(records) if not _REMOTE.match(str(record["file_name"]))]
    if len(local) > ALL:
        local = sorted(random.Random(0).sample(local, SAMPLE))
    faults = {index: fault for index in local if (fault := _find_fault(records[index]))}
    looked = [records[index] for index in local]
    findings.count(
        faults,
        looked,
        "images that were looked at cannot be used",
        lambda index: f"{show(records[index]['file_name'])}: {faults[index]}",
    )
    return len(looked)


def _find_fault(record: dict[str, Any]) -> str:
    """What is wrong with the image of a record; "" if nothing is."""
    try:
        if not stat.S_ISREG(os.stat(record["file_name"]).st_mode):  # a pipe or a device may block for ever
            return "is not a file"
        with Image.open(record["file_name"]) as image:
            if fault := fault_of(image):
                return fault
            stored = image.size
            turned = is_turned(image)
            sizes = {stored[::-1] if turned else stored}
            if turned and image.format == "TIFF":  # depends on the version of Pillow
                sizes.add(stored)
    except FileNotFoundError:
        return "does not exist"
    except Image.DecompressionBombError as error:
        return f"is too large: {error}"
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for damaged files
        reason = "not in a format that Pillow knows"
        if not isinstance(error, Image.UnidentifiedImageError):
            reason = show(getattr(error, "strerror", None) or error)  # strerror says it without the file's name
        return f"cannot be read: {reason}"
    expected = record.get("width"), record.get("height")
    if None in expected or expected in sizes:
        return ""
    width, height = next(iter(sizes))
    exif = f" (stored as {stored[0]} x {stored[1]}, and its EXIF data say how to turn it)" if turned else ""
    return f"is {width} x {height} pixels{exif}, but the annotations say width x height = {expected[0]} x {expected[1]}"


def is_turned(image: Image.Image) -> bool:
    """True if width and height change places when the image is displayed, which is how Detectron2 reads it."""
    if image.format == "PNG" and "exif" not in image.info:  # getexif would read all pixels to look behind them
        return False
    try:
        return image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # damaged EXIF data raise errors of many kinds; Detectron2 ignores such data as well
        return False
