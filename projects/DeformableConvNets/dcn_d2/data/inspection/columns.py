# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The annotations of a data set as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from ..annotations import Annotations, Record, is_box
from ..findings import Findings
from ..needs import Needs


class Columns(Annotations):
    """All annotations of a data set, in one list and in arrays.

    Attributes:
        boxes: (n, 4), x0, y0, x1, y1; NaN where an annotation has no box that can be used.
        categories: (n), -1 where an annotation has none.
        crowd: (n) of bool.
        sizes: (images, 2), width and height; NaN where they are not known.
    """

    def __init__(self, records: Sequence[Record], needs: Needs, findings: Findings) -> None:
        super().__init__(records, needs, findings)
        good = [isinstance(annotation, dict) for annotation in self.all]
        empty: dict[str, Any] = {}
        self.all = [annotation if ok else empty for annotation, ok in zip(self.all, good)]
        corners = [_corners(annotation) for annotation in self.all]
        self.boxes = np.array(corners, dtype=np.float64).reshape(-1, 4)
        self.categories = np.array([_category(value) for value in self.column("category_id")], dtype=np.int64)
        self.crowd = np.array([bool(value) for value in self.column("iscrowd")], dtype=bool)
        sizes = [(record.get("width") or np.nan, record.get("height") or np.nan) for record in records]
        self.sizes = np.array(sizes, dtype=np.float64).reshape(-1, 2)

    @property
    def lengths(self) -> np.ndarray:
        """(n, 2): width and height of the boxes."""
        return self.boxes[:, 2:] - self.boxes[:, :2]

    @property
    def usable(self) -> np.ndarray:
        """(n) of bool: objects, not crowds, whose boxes have an area."""
        with np.errstate(invalid="ignore"):
            return (self.lengths > 0).all(1) & ~self.crowd

    def counts(self) -> np.ndarray:
        """How many usable boxes each image has."""
        return np.bincount(self.image[self.usable], minlength=len(self.records))


_NONE = (np.nan,) * 4


def _corners(annotation: dict[str, Any]) -> tuple[float, ...]:
    box, mode = annotation.get("bbox"), annotation.get("bbox_mode")
    if box is None or mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS) or not is_box(box, 4):
        return _NONE
    x0, y0, x1, y1 = (float(value) for value in box)
    return (x0, y0, x1, y1) if mode == BoxMode.XYXY_ABS else (x0, y0, x0 + x1, y0 + y1)


def _category(value: Any) -> int:
    return int(value) if isinstance(value, (int, np.integer)) and not isinstance(value, bool) else -1
