# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Writes detections as a Parquet file, one row for each detection. Needs pyarrow."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import write_atomically

_ROWS = 10_000  # of a row group; so many are in memory


def require_pyarrow() -> None:
    """Refuses where pyarrow is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError("--format parquet needs pyarrow: pip install pyarrow") from error


def write_parquet(path: Path, records: Iterator[dict[str, Any]], categories: list[dict[str, Any]]) -> None:
    """Writes the detections of all images.

    Columns are image_id (a text, because a COCO file may have such ids), file_name, frame (of a video), width, height,
    category_id, category, score, x, y, w, h (as COCO's bbox), segmentation (COCO's compressed run lengths; the size is
    height and width) and keypoints (x, y, score of each). The last two are empty where the model gives none.
    """
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("image_id", "file_name")),
            *((name, pa.int64()) for name in ("frame", "width", "height", "category_id")),
            ("category", pa.string()),
            *((name, pa.float32()) for name in ("score", "x", "y", "w", "h")),
            ("segmentation", pa.string()),
            ("keypoints", pa.list_(pa.float32())),
        ]
    )
    names = {category["id"]: str(category["name"]) for category in categories}
    rows = (_row(record, detection, names) for record in records for detection in record["detections"])
    with write_atomically(path) as file, parquet.ParquetWriter(file, schema) as writer:
        while group := list(itertools.islice(rows, _ROWS)):
            writer.write_table(pa.Table.from_pylist(group, schema))


def _row(record: dict[str, Any], detection: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    x, y, w, h = detection["bbox"]
    return {
        "image_id": str(record["image_id"]),
        "file_name": os.fsencode(record["file_name"]).decode(errors="backslashreplace"),
        **{key: record[key] for key in ("frame", "width", "height")},
        "category_id": detection["category_id"],
        "category": names[detection["category_id"]],
        "score": detection["score"],
        **{"x": x, "y": y, "w": w, "h": h},
        "segmentation": detection.get("segmentation", {}).get("counts"),
        "keypoints": detection.get("keypoints"),
    }
