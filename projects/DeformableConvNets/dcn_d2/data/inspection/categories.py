# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Looks at the categories of a data set, and compares those of training and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..findings import Findings, show
from ..needs import list_names
from .columns import Columns


def count_objects(columns: Columns, names: Sequence[str] | None) -> dict[str, int]:
    """How many objects, not crowds, each category has; of categories of one name the sum."""
    categories = columns.categories[~columns.crowd]
    counts = np.bincount(categories[categories >= 0], minlength=len(names or ()))
    found: dict[str, int] = {}
    for index, count in enumerate(counts.tolist()):
        name = names[index] if names and index < len(names) else f"number {index}"
        found[name] = found.get(name, 0) + count
    return found


def inspect_categories(
    counts: dict[str, int],
    names: Sequence[str],
    categories: list[dict[str, Any]] | None,
    train: bool,
    findings: Findings,
) -> None:
    """Looks at the categories of one data set.

    Args:
        counts: how many objects each has.
        names: all names.
        categories: those of a file in COCO's format; None for other data.
        train: it is for training.
        findings: what is found.
    """
    often = Counter(names)
    findings.count(
        [index for index, name in enumerate(names) if often[name] > 1],
        names,
        "categories share their name with another",
        lambda index: f"number {index}, {show(names[index], 40)}",
        kind="category-duplicate-name",
        then="They are different classes all the same",
        warn=True,
    )
    if any(counts.values()):
        findings.count(
            [index for index, name in enumerate(names) if not counts.get(name, 0)],
            names,
            "categories have no objects",
            lambda index: show(names[index], 40),
            kind="category-without-objects",
            then="A model cannot learn them" if train else "They do not count in AP",
            warn=train,
            inform=not train,
        )
    ids = sorted(category["id"] for category in categories or ())
    if ids and ids != list(range(ids[0], ids[0] + len(ids))):
        numbers = "; ".join(f"id {key} is class {index}" for index, key in enumerate(ids) if key != ids[0] + index)
        findings.count(
            [index for index, key in enumerate(ids) if index and key != ids[index - 1] + 1],
            ids,
            "categories have an id that does not follow the one before",
            lambda index: f"{ids[index]} after {ids[index - 1]}",
            kind="category-gap",
            then=f"That is allowed: a model numbers its classes without gaps, so {show(numbers, 200)}",
            inform=True,
        )


def compare_categories(train: dict[str, int], test: dict[str, int], findings: Findings) -> None:
    """Notes categories that are tested but not trained; both are numbers of objects by name."""
    names = list(test)
    findings.count(
        [index for index, name in enumerate(names) if test[name] and not train.get(name)],
        names,
        "categories have objects in this test set, but none in the data for training",
        lambda index: f"{show(names[index], 40)} ({test[names[index]]} objects)",
        kind="category-only-in-test",
        then=f"Trained are {list_names([name for name, count in train.items() if count])}",
        warn=True,
    )
