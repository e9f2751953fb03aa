# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What metrics.json holds: losses, learning rate, times and the results of evaluations, over the iterations."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FILE = "metrics.json"
# Results of evaluations: a task and a measure, below the data set's name where there are several.
TASKS = ("bbox", "segm", "keypoints", "box_proposals", "sem_seg", "panoptic_seg", "pose")
MEASURE = re.compile(rf"^(?:(?P<set>.+?)/)?(?P<task>(?:{'|'.join(TASKS)})(?:_\w+)?)/(?P<name>.+)$")


@dataclass
class Series:
    """Values of one scalar, by iteration."""

    iterations: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def thinned(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Gives iterations and values, the means of neighbours where there are more than `most`."""
        x, y = np.array(self.iterations, dtype=float), np.array(self.values, dtype=float)
        if len(x) <= most:
            return x, y
        blocks = np.array_split(np.arange(len(x)), most)
        return np.array([x[block].mean() for block in blocks]), np.array([y[block].mean() for block in blocks])


def read_history(folder: Path) -> dict[str, Series]:
    """Reads metrics.json line by line; a line that a kill has cut off is left out.

    Raises:
        FileNotFoundError: There is none.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"there is no {FILE}")
    found: dict[str, Series] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
                iteration = int(entry.pop("iteration"))
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
            for key, value in entry.items():
                if isinstance(value, (int, float)):
                    series = found.setdefault(key, Series())
                    series.iterations.append(iteration)
                    series.values.append(float(value))
    return found


def split_measure(key: str) -> tuple[str, str, str] | None:
    """Gives data set ("" where the run has one alone), task and measure of a key such as "coco_val/bbox/AP"."""
    match = MEASURE.match(key)
    return (match["set"] or "", match["task"], match["name"]) if match else None


def is_validation_loss(key: str) -> bool:
    """Whether a key is of the loss on held-out data, by its name."""
    return "loss" in key and bool(re.search(r"(^|[_/])val(idation)?[_/]", key))


def is_training_loss(key: str) -> bool:
    """Whether a key is of the loss that is trained, or of a part of it."""
    return "loss" in key and not is_validation_loss(key) and split_measure(key) is None
