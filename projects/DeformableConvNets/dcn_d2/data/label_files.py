# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Checks the files of semantic segmentation: one channel with the label of each pixel, of the size of the image."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image

from .findings import Findings, shorten, show
from .image_files import is_turned

SAMPLE = 20  # files that are read, always the same ones


def check_label_files(
    records: Sequence[dict[str, Any]], classes: tuple[str, int], ignored: int, findings: Findings, train: bool
) -> None:
    """Reads a sample of the files that `sem_seg_file_name` names.

    Args:
        records: in Detectron2's format.
        classes: the config key of the number of classes, and its value.
        ignored: the label of pixels that do not count.
        findings: what is found.
        train: they are read as the training does, which takes the grey levels of colours and palettes for labels. The
            evaluation takes the numbers in a palette's file, and no colours.
    """
    known = [index for index, record in enumerate(records) if record.get("sem_seg_file_name")]
    if len(known) > SAMPLE:
        known = sorted(random.Random(0).sample(known, SAMPLE))
    faults = {index: fault for index in known if (fault := _find_fault(records[index], classes, ignored, train))}
    findings.count(
        faults,
        [records[index] for index in known],
        "files of labels that were looked at cannot be used",
        lambda index: f"{show(records[index]['sem_seg_file_name'])}: {faults[index]}",
    )


def _find_fault(record: dict[str, Any], classes: tuple[str, int], ignored: int, train: bool) -> str:
    """What is wrong with the labels of a record; "" if nothing is."""
    try:
        with PathManager.open(record["sem_seg_file_name"], "rb") as file, Image.open(file) as image:
            labels = np.asarray(image.convert("L") if train else image)
    except FileNotFoundError:
        return "does not exist"
    except (OSError, ValueError, SyntaxError) as error:
        return f"cannot be read: {show(error)}"
    if labels.ndim != 2:
        return f"has {labels.shape[2]} channels; one was expected, with the label of each pixel"
    size = _size_of_image(record)
    if size not in (None, labels.shape):
        return f"is {labels.shape[1]} x {labels.shape[0]} pixels, but its image is {size[1]} x {size[0]}"
    key, number = classes
    wrong = sorted({int(value) for value in np.unique(labels)} - {*range(number), ignored})
    if wrong:
        read = " (its colours as grey levels)" if train and image.mode != "L" else ""
        return f"has the labels {shorten(wrong)}{read}; {key} is {number}, and pixels that do not count are {ignored}"
    return ""


def _size_of_image(record: dict[str, Any]) -> Any:
    """Height and width of a record's image; None if they cannot be found out."""
    if record.get("height") and record.get("width"):
        return record["height"], record["width"]
    try:
        with PathManager.open(record["file_name"], "rb") as file, Image.open(file) as image:
            return image.size if is_turned(image) else image.size[::-1]
    except (OSError, ValueError, SyntaxError):  # `check_image_files` tells it
        return None
