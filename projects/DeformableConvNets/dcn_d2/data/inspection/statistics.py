# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Numbers about a data set: how many, how large, of which shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .columns import Columns
from .pixels import Look

QUANTILES = {"min": 0, "5 %": 5, "median": 50, "95 %": 95, "max": 100}
# COCO's sizes of objects by their area in pixels. COCO takes the area of the mask, here it is that of the box.
SMALL, LARGE = 32**2, 96**2
SHOWN = 30  # categories


def describe(columns: Columns, looks: Sequence[Look | None], counts: dict[str, int], quick: bool) -> dict[str, Any]:
    """Numbers about one data set, ready for JSON.

    Args:
        columns: its annotations.
        looks: what was seen of its images.
        counts: how many objects each category has.
        quick: whether only the headers of images were read.
    """
    lengths = columns.lengths[columns.usable]
    areas = lengths.prod(1)
    small, large = int((areas < SMALL).sum()), int((areas > LARGE).sum())
    modes = Counter(look.mode for look in looks if look and look.mode)
    numbers: dict[str, Any] = {
        "images": len(columns.records),
        "images read": "headers only" if quick else "whole",
        "image modes": dict(modes.most_common()),
        "image width": quantiles(columns.sizes[:, 0]),
        "image height": quantiles(columns.sizes[:, 1]),
        "annotations": len(columns.all),
        "crowds": int(columns.crowd.sum()),
        "categories": len(counts),
        "objects of categories": _largest(counts),
        "boxes per image": quantiles(columns.counts()),
        "box sizes (COCO)": {"small": small, "medium": len(areas) - small - large, "large": large},
        "box width": quantiles(lengths[:, 0]),
        "box height": quantiles(lengths[:, 1]),
        "box height / width": quantiles(lengths[:, 1] / lengths[:, 0]),
    }
    return {key: value for key, value in numbers.items() if value != {}}


def quantiles(values: np.ndarray) -> dict[str, float]:
    """The quantiles of an array with three digits after the decimal point at most; {} if it has no numbers."""
    known = values[np.isfinite(values)]
    if not len(known):
        return {}
    found = np.percentile(known, list(QUANTILES.values()))
    return {name: _round(value) for name, value in zip(QUANTILES, found.tolist())}


def _round(value: float) -> float:
    return int(value) if value == int(value) else round(value, 2)


def _largest(counts: dict[str, int]) -> dict[str, int]:
    order = sorted(counts.items(), key=lambda item: -item[1])
    rest = order[SHOWN:]
    return dict(order[:SHOWN]) | ({f"and {len(rest)} more": sum(count for _, count in rest)} if rest else {})
