# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Checks of the annotations of a loaded data set: categories, boxes, masks, keypoints.

COCO's 860,000 annotations take a second or two: whole columns are checked at a time, and single values only where a
column has a fault.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from .findings import Findings, shorten, show
from .needs import Needs

Record = dict[str, Any]
BOX_LENGTHS = {BoxMode.XYXY_ABS: 4, BoxMode.XYWH_ABS: 4, BoxMode.XYWHA_ABS: 5}
EDGE = 1.0  # pixels that a box may reach over its image's edge without a warning, because of rounding


def check_annotations(records: Sequence[Record], needs: Needs, names: Sequence[str] | None, findings: Findings) -> None:
    """Checks all annotations, as `check_records` does."""
    annotations = Annotations(records, needs, findings)
    strange = [i for i, annotation in enumerate(annotations.all) if not isinstance(annotation, dict)]
    if annotations.report(strange, "are not dicts", "entry-not-dict"):
        return
    _check_categories(annotations, names)
    _check_boxes(annotations)
    crowd = np.array([bool(value) for value in annotations.column("iscrowd")], dtype=bool)
    if needs.masks:
        _check_masks(annotations, crowd)
    if needs.keypoints:
        _check_keypoints(annotations, crowd)


def name_image(record: Record) -> str:
    """The image of a record in words."""
    identity = f"image {shorten(record['image_id'])}" if "image_id" in record else "image"
    return f"{identity} ({show(record.get('file_name', 'without file_name'))})"


def is_number(value: Any) -> bool:
    """True for finite numbers of any kind, but not for a bool."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


class Annotations:
    """All annotations of a data set in one list, and which image each is of."""

    def __init__(self, records: Sequence[Record], needs: Needs, findings: Findings) -> None:
        self.records, self.needs, self.findings = records, needs, findings
        lists = [record.get("annotations") or () for record in records]
        counts = [len(annotations) for annotations in lists]
        self.all: list[dict[str, Any]] = list(itertools.chain.from_iterable(lists))
        self.image = np.repeat(np.arange(len(records)), counts)
        self.first = np.cumsum([0, *counts])

    def describe(self, index: int) -> str:
        image = int(self.image[index])
        return f"annotation {index - int(self.first[image])} of {name_image(self.records[image])}"

    def report(
        self, where: Iterable[int], what: str, kind: str, *, key: str = "", then: str = "", warn: bool = False
    ) -> bool:
        """Notes a fault, with the value of a key."""

        def describe(index: int) -> str:
            return self.describe(index) + (f" has {shorten(self.all[index].get(key))}" if key else "")

        what = f"annotations {what}"
        return self.findings.count(where, self.all, what, describe, kind=kind, then=then, warn=warn)

    def column(self, key: str) -> list[Any]:
        return [annotation.get(key) for annotation in self.all]


def _check_categories(annotations: Annotations, names: Sequence[str] | None) -> None:
    """Every category_id is a whole number from 0 to below the number of classes."""
    values = annotations.column("category_id")
    column = _as_array(values)
    if column is None or column.ndim != 1 or column.dtype.kind not in "iu":
        bad = [
            i for i, value in enumerate(values) if not isinstance(value, numbers.Integral) or isinstance(value, bool)
        ]
        what = "have a 'category_id' that is not a whole number"
        if annotations.report(bad, what, "annotation-without-category", key="category_id"):
            return
        column = np.array([int(value) for value in values], dtype=np.int64)
    things = annotations.needs.things
    classes = len(names) if names else things[1] if things else None
    if classes is not None:
        source = "categories of the data set" if names else things[0] if things else ""
        outside = np.flatnonzero((column < 0) | (column >= classes))
        what = f"have a 'category_id' outside 0 to {classes - 1} ({classes}: {source})"
        annotations.report(outside.tolist(), what, "annotation-category-outside", key="category_id")


def _as_array(values: list[Any]) -> np.ndarray | None:
    """The values as one array of numbers; None if they are not alike."""
    if not values:
        return np.zeros(0, dtype=np.int64)
    try:
        column = np.array(values)
    except (ValueError, TypeError, OverflowError):
        return None
    return column if column.dtype.kind in "iuf" else None


def _check_boxes(annotations: Annotations) -> None:
    values, modes = annotations.column("bbox"), annotations.column("bbox_mode")
    allowed = ", ".join(f"BoxMode.{mode.name}" for mode in BOX_LENGTHS)
    missing = [index for index, value in enumerate(values) if value is None]
    strange = [i for i, mode in enumerate(modes) if not (isinstance(mode, int) and mode in BOX_LENGTHS)]
    failed = annotations.report(missing, "have no 'bbox'", "box-missing")
    what = f"have a 'bbox_mode' that is none of {allowed}"
    if failed | annotations.report(strange, what, "box-mode", key="bbox_mode"):
        return
    modes_column = np.array([int(mode) for mode in modes])
    for mode, length in BOX_LENGTHS.items():
        where = np.flatnonzero(modes_column == int(mode))
        if len(where) == 0:
            continue
        boxes = _as_array(values if len(where) == len(values) else [values[index] for index in where])
        if boxes is None or boxes.shape != (len(where), length) or not np.isfinite(boxes).all():
            bad = [int(index) for index in where if not is_box(values[index], length)]
            annotations.report(bad, f"have a 'bbox' that is not {length} finite numbers", "box-not-finite", key="bbox")
            good = [int(index) for index in where if is_box(values[index], length)]
            where, boxes = np.array(good, dtype=int), np.array([list(values[i]) for i in good], np.float64)
            boxes = boxes.reshape(-1, length)
        if length == 4:
            _check_place(annotations, where, boxes.astype(np.float64), mode)


def is_box(value: Any, length: int) -> bool:
    """True for `length` finite numbers."""
    try:
        return not isinstance(value, (str, bytes, dict)) and len(value) == length and all(map(is_number, value))
    except TypeError:
        return False


def _check_place(annotations: Annotations, where: np.ndarray, boxes: np.ndarray, mode: BoxMode) -> None:
    """Counts boxes that have no area or do not lie in their image."""
    x0, y0, x1, y1 = boxes.T
    if mode == BoxMode.XYWH_ABS:
        x1, y1 = x0 + x1, y0 + y1
    width, height = (
        np.array([record.get(key) or np.inf for record in annotations.records], dtype=np.float64)[
            annotations.image[where]
        ]
        for key in ("width", "height")
    )
    mirrored = (x1 < x0) | (y1 < y0)
    flat = ~mirrored & ((x1 == x0) | (y1 == y0))
    outside = ~mirrored & ~flat & ((x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height))
    over = (x0 < -EDGE) | (y0 < -EDGE) | (x1 > width + EDGE) | (y1 > height + EDGE)
    train = annotations.needs.train
    lost = "The training leaves them out" if train else "The evaluation counts them as not found"
    corners = (
        "The training takes what lies between their corners, or leaves them out of images that it does not resize"
        if train
        else lost
    )
    cut = "The training cuts them there" if train else "The evaluation takes them as they are"
    over &= ~outside & ~flat & ~mirrored
    for found, kind, what, then in (
        (mirrored, "box-negative", "have a 'bbox' of negative width or height", corners),
        (flat, "box-flat", "have a 'bbox' of no width or height", lost),
        (outside, "box-outside", "have a 'bbox' outside their image", lost),
        (over, "box-over-edge", "have a 'bbox' that reaches over the edge of their image", cut),
    ):
        # If no box is left, the cause is probably not a few bad boxes but, for example, a wrong bbox_mode.
        warn = then == cut or int(found.sum()) < len(annotations.all)
        annotations.report(where[found].tolist(), what, kind, key="bbox", then=then, warn=warn)


def _check_masks(annotations: Annotations, crowd: np.ndarray) -> None:
    """Each object has a mask of a kind that INPUT.MASK_FORMAT takes. Crowds are not trained on."""
    values = annotations.column("segmentation")
    of_objects = np.flatnonzero(~crowd).tolist() if annotations.needs.train else range(len(values))

    def report(is_bad: Callable[[Any], bool], what: str, kind: str, then: str = "") -> bool:
        found = [index for index in of_objects if is_bad(values[index])]
        return annotations.report(found, what, kind, key="segmentation", then=then)

    missing = "have no 'segmentation', but MODEL.MASK_ON is True"
    way = "Take them out of the data, or train without masks: MODEL.MASK_ON False"
    if report(_is_nothing, missing, "mask-missing", way):
        return
    unknown = "have a 'segmentation' that is neither polygons nor run lengths"
    if report(lambda value: not isinstance(value, (list, dict)), unknown, "mask-unknown"):
        return
    bad = "have a 'segmentation' with a polygon that is not [x0, y0, x1, y1, x2, y2, …] of finite numbers"
    report(lambda value: isinstance(value, list) and not all(map(_is_polygon, value)), bad, "mask-polygon")
    if annotations.needs.train and annotations.needs.mask_format == "polygon":
        runs = "have a 'segmentation' of run lengths, but INPUT.MASK_FORMAT is polygon"
        way = "Set it to bitmask, which takes polygons as well"
        report(lambda value: isinstance(value, dict), runs, "mask-format", way)
    sizes = [(record.get("height"), record.get("width")) for record in annotations.records]
    image = annotations.image.tolist()
    misfits = [i for i in of_objects if isinstance(values[i], dict) and not fits_image(values[i], sizes[image[i]])]
    wrong = "have run lengths whose 'size' is not [height, width] of their image, or 'counts' that are not compressed"
    annotations.report(misfits, wrong, "mask-size", key="segmentation")


def _is_nothing(value: Any) -> bool:
    return not isinstance(value, np.ndarray) and not value


def _is_polygon(polygon: Any) -> bool:
    if isinstance(polygon, np.ndarray):
        return polygon.size >= 6 and polygon.size % 2 == 0 and bool(np.isfinite(polygon).all())
    try:  # the sum is a fast way to find values that are not numbers, or not finite
        return len(polygon) >= 6 and len(polygon) % 2 == 0 and math.isfinite(sum(polygon))
    except (TypeError, OverflowError):
        return False


def fits_image(runs: dict[str, Any], height_and_width: tuple[Any, Any]) -> bool:
    """True if a mask of run lengths can be decoded and has the size of its image, as far as that is known."""
    size = runs.get("size")
    if not isinstance(runs.get("counts"), (str, bytes)) or not isinstance(size, (list, tuple)) or len(size) != 2:
        return False
    return all(known in (None, value) for known, value in zip(height_and_width, size))


def _check_keypoints(annotations: Annotations, crowd: np.ndarray) -> None:
    values, number = annotations.column("keypoints"), annotations.needs.keypoints
    of_objects = np.flatnonzero(~crowd) if annotations.needs.train else np.arange(len(values))
    missing = [int(i) for i in of_objects if values[i] is None]
    if annotations.report(missing, "have no 'keypoints', but MODEL.KEYPOINT_ON is True", "keypoints-missing"):
        return
    wrong = [int(i) for i in of_objects if not is_box(values[i], 3 * number)]
    key = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
    what = f"have 'keypoints' that are not {3 * number} finite numbers ({key} {number}, each x, y, visibility)"
    annotations.report(wrong, what, "keypoints-number", key="keypoints")
