# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Writes results/parity.csv and results/parity_training.csv: `python -m benchmarks.parity [--small] [ROW ...]`.

Rows that the tables have already and that are not run again stay as they are.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.origin import PROJECT
from benchmarks.origin import commit as named_commit

from .rows import ROWS, SMALL_SCALE, TEST_SCALE, TRAINED_ROWS

RESULTS = PROJECT / "results"
COLUMNS = [
    *("row", "pooling", "photograph", "input_size", "input", "fpn", "proposals", "proposals_matched", "proposals_px"),
    *("detections", "detections_ours", "detections_matched", "classes", "boxes_px", "scores", "mask_pixels"),
    *("commit", "mmdet", "mmcv", "torch", "device"),
]
TRAINING_COLUMNS = ["row", "term", "dcn_d2", "mmdetection", "relative", "commit", "mmdet", "mmcv", "torch", "device"]


def origin() -> dict[str, str]:
    """Where a number comes from; a commit with "+" behind it had changes."""
    import mmcv
    import mmdet

    commit, changed = named_commit()
    commit = commit[:10] + ("+" if changed else "")
    versions = {"mmdet": mmdet.__version__, "mmcv": mmcv.__version__, "torch": torch.__version__.split("+")[0]}
    return {"commit": commit, **versions, "device": "CPU"}


def update(path: Path, columns: list[str], key: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Puts rows into a table, in the order of the zoo; they replace rows with the same key."""

    def shown(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    table: dict[tuple[str, ...], dict[str, str]] = {}
    if path.exists():
        with path.open(newline="") as file:
            table = {tuple(row[name] for name in key): row for row in csv.DictReader(file)}
    for row in rows:
        table[tuple(str(row[name]) for name in key)] = {name: shown(value) for name, value in row.items()}
    order = list(ROWS)
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(table.values(), key=lambda row: order.index(row["row"])))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows of the zoo; by default all")
    parser.add_argument("--small", action="store_true", help=f"{SMALL_SCALE} instead of the test scale {TEST_SCALE}")
    parser.add_argument("--training", action="store_true", help="the losses instead of the detections")
    parser.add_argument("--pooling", choices=("original", "aligned"), help="of the dpool and mdpool rows")
    arguments = parser.parse_args()
    try:
        from . import runner  # imports MMDetection, which --help does not need
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed: CONTRIBUTING.md says how to install MMDetection and mmcv")
    if unknown := set(arguments.rows) - set(ROWS):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    for row in arguments.rows or (TRAINED_ROWS if arguments.training else ROWS):
        start = time.time()
        if arguments.training:
            terms, gradients = runner.compare_losses(row)
            lines = [
                {"row": row, "term": name, "dcn_d2": f"{ours:.7g}", "mmdetection": f"{theirs:.7g}"}
                | {"relative": abs(ours - theirs) / abs(theirs), **origin()}
                for name, (ours, theirs) in terms.items()
            ]
            worst = max(gradients.values())
            lines.append({"row": row, "term": "largest difference of a gradient", "relative": worst, **origin()})
            update(RESULTS / "parity_training.csv", TRAINING_COLUMNS, ("row", "term"), lines)
        else:
            photograph = runner.PHOTOGRAPHS[list(ROWS).index(row) % len(runner.PHOTOGRAPHS)]
            with tempfile.TemporaryDirectory() as folder:
                os.environ["FVCORE_CACHE"] = os.environ["XDG_CACHE_HOME"] = folder
                scale = SMALL_SCALE if arguments.small else TEST_SCALE
                differences = runner.compare_detections(row, photograph, scale, Path(folder), pooling=arguments.pooling)
                lines = [differences | origin()]
            update(RESULTS / "parity.csv", COLUMNS, ("row", "pooling", "input_size"), lines)
        print(f"{row} ({time.time() - start:.0f} s)", *lines, sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
