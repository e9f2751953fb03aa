# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The columns that detections become: what they hold, their types, and how they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from detectron2.structures import Instances

if TYPE_CHECKING:
    import pyarrow


class Column(NamedTuple):
    """A column of the result.

    Args:
        ddl: its type in Spark's language.
        values: makes the value of a row from the detections in its image.
        empty: the value of a row whose image could not be read.
    """

    ddl: str
    values: Callable[[Instances], Any]
    empty: Any


def encode_masks(masks: Any) -> list[dict[str, Any]]:
    """COCO's run-length encoding of (n, height, width) masks, with "counts" as text."""
    from pycocotools import mask as coco

    encoded = [coco.encode(np.asfortranarray(each.numpy(), dtype=np.uint8)) for each in masks]
    return [{"size": [int(side) for side in each["size"]], "counts": each["counts"].decode()} for each in encoded]


# Lists as values, and not arrays: engines make tensors of their own of arrays, which other programs cannot read.
COLUMNS = {
    "boxes": Column("array<array<float>>", lambda found: found.pred_boxes.tensor.tolist(), []),
    "scores": Column("array<float>", lambda found: found.scores.tolist(), []),
    "classes": Column("array<int>", lambda found: found.pred_classes.tolist(), []),
    "masks": Column("array<struct<size:array<int>,counts:string>>", lambda found: encode_masks(found.pred_masks), []),
    "keypoints": Column("array<array<array<float>>>", lambda found: found.pred_keypoints.tolist(), []),
    "height": Column("int", lambda found: found.image_size[0], None),
    "width": Column("int", lambda found: found.image_size[1], None),
    "error": Column("string", lambda found: None, None),
}


def arrow_type(name: str) -> pyarrow.DataType:
    """The type of a column in Arrow, which is the same as in Spark."""
    import pyarrow as pa

    return {
        "boxes": pa.list_(pa.list_(pa.float32())),
        "scores": pa.list_(pa.float32()),
        "classes": pa.list_(pa.int32()),
        "masks": pa.list_(pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])),
        "keypoints": pa.list_(pa.list_(pa.list_(pa.float32()))),
        "height": pa.int32(),
        "width": pa.int32(),
        "error": pa.string(),
    }[name]


def make_columns(names: Sequence[str], results: Sequence[Instances | Exception]) -> dict[str, list[Any]]:
    """Gives lists with a value for each image, by the names of columns; for an error, its words in "error"."""

    def value(name: str, result: Instances | Exception) -> Any:
        if not isinstance(result, Exception):
            return COLUMNS[name].values(result)
        return str(result) if name == "error" else COLUMNS[name].empty

    return {name: [value(name, result) for result in results] for name in names}
