# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Exports every row of the zoo, and compares the files with the models: results/export.json.

    python -m benchmarks.export_rows                          all rows, ONNX and OpenVINO, narrow models
    python -m benchmarks.export_rows --full                   the rows as they are; takes hours on few cores
    python -m benchmarks.export_rows --rows ROW... --formats onnx openvino pt2 torchscript

Weights are random, with norms fitted to the images and scores spread, so that detections are many and differ. Sizes
and batch are free. Each file runs on a batch of one image and on one of two, of other sizes than it was traced with.
The exit status is 1 if an export fails, or if its results differ by more than rounding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run by the file's name, without -m

from dcn_d2.quiet import silence_detectron2_warnings

silence_detectron2_warnings()  # before Detectron2 is imported

from detectron2.config import CfgNode

from benchmarks.failures import Failures, attempt
from benchmarks.origin import PROJECT
from benchmarks.results import Results
from dcn_d2 import model_zoo
from dcn_d2.export import Exported, export
from dcn_d2.export.formats import SUFFIXES
from tests.export.models import build_lively
from tests.slim import SLIM

SIDE = 128  # the shorter side of the images
# Without these, boxes would be few: the zoo's rows keep scores above 0.05 of 81 classes.
CHANGES = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "INPUT.MIN_SIZE_TEST", SIDE]


def config_of(row: str, full: bool) -> CfgNode:
    """The config of a row, for small images, and of a narrow model unless it is to be the full one."""
    cfg = model_zoo.get_config(row)
    cfg.merge_from_list([*([] if full else SLIM), *CHANGES])
    return cfg


def compare(cfg: CfgNode, model: Any, row: str, format: str) -> dict[str, Any]:
    """Exports a model in one format, and gives what was compared."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported: Exported = export(cfg, Path(folder, f"model{SUFFIXES[format]}"), model=model, row=row)
        comparison = exported.comparison
        assert comparison is not None
        return {
            "megabytes": sum(exported.files.values()) / 1e6,
            **{
                name: getattr(comparison, name) for name in ("expected", "found", "matched", "at_limit", "box", "score")
            },
            **({"mask": comparison.mask, "mask_inside": comparison.mask_inside} if comparison.mask_pixels else {}),
            "threshold": comparison.threshold,
        }


def describe(line: dict[str, Any]) -> str:
    """A line about a row."""
    found = "; ".join(
        f"{format} {value['matched']}/{value['expected']}, {value['box']:.1e} px, {value['score']:.1e}"
        for format, value in line["formats"].items()
        if value
    )
    return f"{line['row']}: {found}"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=model_zoo.list_models(), default=model_zoo.list_models())
    parser.add_argument("--formats", nargs="+", choices=tuple(SUFFIXES), default=["onnx", "openvino"])
    parser.add_argument("--full", action="store_true", help="the rows as they are, not narrow ones")
    parser.add_argument("--output", type=Path, default=PROJECT / "results" / "export.json")
    args = parser.parse_args(arguments)
    results = Results(args.output, "export", "cpu")
    for row in args.rows:
        failed: Failures = {}
        cfg = config_of(row, args.full)
        model = build_lively(cfg)
        found = {
            format: attempt(failed, f"to {format}", lambda format=format: compare(cfg, model, row, format))
            for format in args.formats
        }
        results.add({"row": row, "full": args.full, "formats": found}, failed, describe)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
