# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Batches of rows as the engines give them: dictionaries of arrays, pandas' frames and series, tables of Arrow."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .columns import arrow_type

IMAGE_COLUMNS = ("image", "bytes", "path")  # the first of them that a batch has holds its images


def is_series(batch: object) -> bool:
    """Whether it is a `pandas.Series`; pandas is not imported for that."""
    return _is(batch, "pandas", "Series")


def column_names(batch: object) -> list[str]:
    """Names of the columns of a batch.

    Raises:
        TypeError: It is no batch.
    """
    if _is(batch, "pandas", "DataFrame"):
        return list(batch.columns)  # type: ignore[attr-defined]
    if _is(batch, "pyarrow", "Table"):
        return list(batch.column_names)  # type: ignore[attr-defined]
    if isinstance(batch, Mapping):
        return list(batch)
    raise TypeError(
        f"a batch is a {type(batch).__module__}.{type(batch).__qualname__}; expected a dictionary of arrays, a "
        "pandas.DataFrame or an iterator of them, a pandas.Series of images, or a pyarrow.Table"
    )


def find_images(batch: object, column: str | None) -> tuple[str, Sequence[Any]]:
    """Gives the name of the column with images and its values.

    Raises:
        KeyError: There is no such column.
    """
    names = column_names(batch)
    wanted = (column,) if column else IMAGE_COLUMNS
    name = next((name for name in wanted if name in names), None)
    if name is None:
        listed = " or ".join(map(repr, wanted))
        hint = "" if column else "; image_column names another"
        raise KeyError(f"the batch has no column {listed} for images, only {', '.join(map(repr, names))}{hint}")
    values = batch[name]  # type: ignore[index]
    if isinstance(values, (str, bytes)):
        raise TypeError(
            f"{name!r} holds one image, not a column of them: batches are expected, as of Ray's map_batches"
        )
    return name, values.to_pylist() if _is(batch, "pyarrow", "Table") else list(values)


def put_together(batch: Any, kept: Sequence[str], columns: Mapping[str, list[Any]]) -> Any:
    """Gives the kept columns of a batch and new ones, in the form of the batch; a dictionary for a dictionary."""
    if is_series(batch):
        return sys.modules["pandas"].DataFrame(
            {name: objects(values) for name, values in columns.items()}, index=batch.index, dtype=object
        )
    if _is(batch, "pandas", "DataFrame"):
        frame = batch[list(kept)].copy()
        for name, values in columns.items():  # of objects: otherwise pandas 3 makes texts of them, and NaN of None
            frame[name] = sys.modules["pandas"].Series(objects(values), index=batch.index, dtype=object)
        return frame
    if _is(batch, "pyarrow", "Table"):
        arrow = sys.modules["pyarrow"]
        table = batch.select(list(kept))
        for name, values in columns.items():
            table = table.append_column(name, arrow.array(values, arrow_type(name)))
        return table
    return {name: batch[name] for name in kept} | {name: objects(values) for name, values in columns.items()}


def objects(values: list[Any]) -> np.ndarray:
    """A one-dimensional array of objects, also of lists that have the same lengths."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _is(batch: object, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(batch, kind)
