# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Looks at annotations for what a training takes without a word: crowds, repeated boxes, masks, keypoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from ..annotations import fits_image
from ..findings import Findings, shorten
from ..needs import Needs
from .columns import Columns

SLACK = 2.0, 0.05  # pixels, and part of the box's side, that a mask may reach over its box


def inspect_objects(columns: Columns) -> None:
    """Notes what it finds in `columns.findings`."""
    _inspect_images(columns)
    _inspect_repeated(columns)
    _inspect_masks(columns)
    _inspect_keypoints(columns)


def _inspect_images(columns: Columns) -> None:
    columns.findings.count(
        np.flatnonzero(columns.crowd).tolist(),
        columns.all,
        "annotations are crowds",
        columns.describe,
        kind="crowd",
        then="The training does not learn from them; the evaluation ignores what is found there",
        inform=True,
    )
    empty = [index for index, record in enumerate(columns.records) if not record.get("annotations")]
    if len(empty) == len(columns.records) and not columns.needs.train:
        return  # a test set without annotations
    lost = columns.needs.train and columns.needs.drops_empty
    columns.findings.count(
        empty,
        columns.records,
        "images have no annotations",
        lambda index: str(columns.records[index]["file_name"]),
        kind="image-without-annotations",
        then="The training leaves them out (DATALOADER.FILTER_EMPTY_ANNOTATIONS)" if lost else "",
        inform=True,
    )


def _inspect_repeated(columns: Columns) -> None:
    where = np.flatnonzero(columns.usable)
    rows = np.column_stack([columns.image[where], columns.categories[where], columns.boxes[where]])
    order = np.lexsort(rows.T[::-1])
    same = (rows[order][1:] == rows[order][:-1]).all(1)  # as the one before
    columns.findings.count(
        sorted(where[order][1:][same].tolist()),
        columns.all,
        "annotations repeat another one of their image: the same box of the same category",
        columns.describe,
        kind="box-twice",
        then="The evaluation counts one of them as not found",
        warn=True,
    )


def _inspect_masks(columns: Columns) -> None:
    values = columns.column("segmentation")
    having = [index for index, value in enumerate(values) if isinstance(value, (list, dict)) and value]
    lengths = columns.lengths
    outside, wrong = [], []
    for index in having:
        record = columns.records[int(columns.image[index])]
        if isinstance(values[index], dict) and not fits_image(
            values[index], (record.get("height"), record.get("width"))
        ):
            wrong.append(index)
            continue
        extent = _extent(values[index])
        if extent is not None and not np.isnan(columns.boxes[index]).any():
            slack = np.maximum(SLACK[0], SLACK[1] * np.tile(lengths[index], 2))
            over = (columns.boxes[index] - extent) * (1, 1, -1, -1)
            if (over > slack).any() and not columns.crowd[index]:
                outside.append(index)
    what = "annotations have a mask that reaches over its box"
    columns.findings.count(outside, columns.all, what, columns.describe, kind="mask-outside-box", warn=True)
    if not columns.needs.masks:  # else the training's own check has said it
        what = "annotations have run lengths whose 'size' is not that of their image, or that are not compressed"
        columns.findings.count(wrong, columns.all, what, columns.describe, kind="mask-size", warn=True)
        missing = sorted(set(np.flatnonzero(~columns.crowd).tolist()) - set(having)) if having else []
        what = "annotations have no mask, while others have one"
        columns.findings.count(missing, columns.all, what, columns.describe, kind="mask-missing", inform=True)


def _extent(value: Any) -> np.ndarray | None:
    """(4): the corners of a mask's bounding box; None if it cannot be told."""
    with contextlib.suppress(ValueError, TypeError):  # a mask with a fault, which is told elsewhere
        if isinstance(value, dict):
            x, y, width, height = coco_mask.toBbox(value)
            return np.array([x, y, x + width, y + height])
        points = np.concatenate([np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in value])
        return np.concatenate([points.min(0), points.max(0)])
    return None


def _inspect_keypoints(columns: Columns) -> None:
    values = columns.column("keypoints")
    having = [index for index, value in enumerate(values) if value is not None and len(value)]
    if not having:
        return
    usual = columns.needs.keypoints or _most_common(len(values[index]) // 3 for index in having)
    if not columns.needs.keypoints:  # else the training's own check has said it
        odd = [index for index in having if len(values[index]) != 3 * usual]
        what = f"annotations have another number of keypoints than {usual}, three numbers each"
        columns.findings.count(odd, columns.all, what, columns.describe, kind="keypoints-number", warn=True)
    strange = [index for index in having if not set(values[index][2::3]) <= {0, 1, 2}]
    columns.findings.count(
        strange,
        columns.all,
        "annotations have a keypoint whose visibility is not 0, 1 or 2",
        lambda index: f"{columns.describe(index)} has {shorten(values[index][2::3])}",
        kind="keypoints-visibility",
        then="0 is not labelled, 1 labelled but hidden, 2 visible",
        warn=True,
    )


def _most_common(values: Iterable[int]) -> int:
    numbers, counts = np.unique(list(values), return_counts=True)
    return int(numbers[counts.argmax()])


def inspect_polygons(annotations: list[dict[str, Any]], needs: Needs, findings: Findings) -> None:
    """Notes polygons of less than 3 points in a file's annotations: Detectron2's loader drops them without counting."""
    if any(fault.kind == "mask-few-points" for fault in findings.faults):
        return
    findings.count(
        [index for index, annotation in enumerate(annotations) if _has_bad_polygon(annotation.get("segmentation"))],
        annotations,
        "annotations have a polygon of less than 3 points, or of an odd number of values",
        lambda index: f"id {shorten(annotations[index].get('id'))}",
        kind="mask-few-points",
        then="Detectron2 leaves out such polygons, and objects that have no other, with or without masks in the model",
        warn=True,
    )


def _has_bad_polygon(value: Any) -> bool:
    return isinstance(value, list) and any(len(polygon) < 6 or len(polygon) % 2 for polygon in value)
