# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What it gains to give a predictor many images: Faster R-CNN R-50-FPN with mdconv c3-c5, 64 JPEG files of one size.

    python -m benchmarks.predict                     the CPU, 1 thread and all threads
    python -m benchmarks.predict --device cuda       the GPU
    python -m benchmarks.predict --quick             three repeats of 8 small images
    python -m benchmarks.predict --check FILE...     which goals hold

Contestants are a call for each image (one by one), a call with the list of all (many), the same in the caller's thread
in batches of 2, 4 and 8 (batches), and on a CPU with several threads batches of 1, 2 and 4 of which several run at once
(at once). Times are milliseconds for an image, from file to boxes: with one thread the CPU time of the process, else
the wall time. Weights are random and the same for all; scores are spread so that boxes are found.

A contestant drops out if it raises, or if it finds other boxes than one by one. Then the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run by the file's name, without -m

from dcn_d2.quiet import silence_detectron2_warnings

silence_detectron2_warnings()  # before Detectron2 is imported

import numpy as np
import torch
from detectron2.structures import pairwise_iou
from PIL import Image

from benchmarks import command_line, detector, measure, rows
from benchmarks.failures import Failures, attempt, note
from benchmarks.measure import Calls
from benchmarks.results import Results
from dcn_d2.engine import DCNPredictor

SIZES = {"small": (256, 256), "large": (800, 1216)}
IMAGES = 64
MOST_SECONDS = 600.0  # per contestant and row
SPREAD = 3.0  # standard deviation of the logits of classes
LEAST_EQUAL = 0.98  # of the boxes: random scores are so dense that rounding changes the order of some


def write_images(folder: Path, number: int, size: tuple[int, int]) -> list[str]:
    """Writes smooth JPEG images, each of its own."""
    generator = np.random.default_rng(0)
    files = []
    for index in range(number):
        small = Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        files.append(str(folder / f"{index:04d}.jpg"))
        small.resize(size[::-1], Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


def build(size: tuple[int, int], device: str, overrides: list[Any]) -> DCNPredictor:
    """A predictor with the deformable model of benchmarks/detector.py, which resizes images to `size`."""
    changes = [*overrides, "MODEL.DCN.MEMORY_FORMAT", "auto", "INPUT.MIN_SIZE_TEST", min(size)]
    cfg = detector.configs([*changes, "MODEL.WEIGHTS", ""], device)["dcn_d2"]
    generator = torch.Generator().manual_seed(0)
    predictor = DCNPredictor(cfg, untrained=True)
    predictor.model = detector.build(changes, device, torch.randn(1, 3, *size, generator=generator).to(device))[
        "dcn_d2"
    ]
    return predictor


def spread_scores(predictor: DCNPredictor, file: str) -> None:
    """Scales the logits of classes so that they have the standard deviation SPREAD in an image."""
    scores = predictor.model.roi_heads.box_predictor.cls_score
    found: list[torch.Tensor] = []
    hook = scores.register_forward_hook(lambda module, inputs, output: found.append(output))
    predictor(file)
    hook.remove()
    with torch.no_grad():
        scores.weight *= SPREAD / found[0].std()


def contestants(predictor: DCNPredictor, files: list[str], threads: int) -> dict[str, Callable[[], list[Any]]]:
    """Each gives the outputs for all files."""

    def many(batch_size: int | None, workers: int | None) -> Callable[[], list[Any]]:
        def call() -> list[Any]:
            predictor.batch_size, predictor.workers = batch_size, workers
            return predictor(files)

        return call

    found: dict[str, Callable[[], list[Any]]] = {
        "one by one": lambda: [predictor(file) for file in files],
        "many": many(None, None),
    }
    found |= {f"batches of {number}": many(number, 1) for number in (2, 4, 8)}
    if threads > 1:
        found |= {f"at once, batches of {number}": many(number, threads) for number in (1, 2, 4)}
    return found


def choose(calls: dict[str, Callable[[], list[Any]]], wanted: list[str] | None) -> dict[str, Callable[[], list[Any]]]:
    """Gives "one by one" and the contestants that are wanted; all for None."""
    return {name: call for name, call in calls.items() if wanted is None or name in ("one by one", *wanted)}


def equal_boxes(found: Any, expected: Any) -> tuple[int, int]:
    """How many boxes have one of the same class, place and score in the other set, and how many the larger set has."""
    overlaps = pairwise_iou(found.pred_boxes, expected.pred_boxes) > 0.99
    same = found.pred_classes[:, None] == expected.pred_classes[None]
    close = (found.scores[:, None] - expected.scores[None]).abs() < 1e-2
    equal = (overlaps & same & close).any(1).sum() if len(found) and len(expected) else 0
    return int(equal), max(len(found), len(expected))


def check_equal(calls: dict[str, Callable[[], list[Any]]]) -> Failures:
    """Returns whose boxes differ from those of one by one, and how many do."""
    failed: Failures = {}
    outputs = {name: attempt(failed, name, call) for name, call in calls.items()}
    for name, results in outputs.items():
        if not results or not outputs["one by one"]:
            continue
        pairs = [equal_boxes(a["instances"], b["instances"]) for a, b in zip(results, outputs["one by one"])]
        equal, total = (sum(column) for column in zip(*pairs))
        if not total or equal < LEAST_EQUAL * total:
            note(failed, name, f"only {equal} of {total} boxes are those of one by one")
    return failed


def measure_time(
    arguments: argparse.Namespace, sizes: dict[str, tuple[int, int]], overrides: list[Any], results: Results
) -> None:
    """Times every size and number of threads; a row and a line for each."""
    with tempfile.TemporaryDirectory() as folder:
        for name, size in sizes.items():
            files = write_images(Path(folder), arguments.images, size)
            predictor = build(size, arguments.device, overrides)
            spread_scores(predictor, files[0])
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                shape = {"name": f"R-50-FPN, {name}", "height": size[0], "width": size[1], "images": len(files)}
                row = {"shape": shape, "pass": "prediction", "dtype": arguments.dtype, "threads": threads}
                # Once with fewer images, which also warms everything up.
                some = files[: max(2, len(files) // 4)]
                failed = check_equal(choose(contestants(predictor, some, threads), arguments.contestants))
                calls: Calls = {**choose(contestants(predictor, files, threads), arguments.contestants)}
                clock = time.process_time if threads == 1 and arguments.device == "cpu" else time.perf_counter
                row |= measure.interleave(
                    calls, arguments.device, arguments.repeats, failed, MOST_SECONDS, clock=clock, parts=len(files)
                )
                results.add(row, failed, describe)


def describe(row: dict[str, Any]) -> str:
    """One line: times, and how much faster each is than one by one."""
    times = {name: timing["median"] for name, timing in row["milliseconds"].items()}
    words = "  ".join(
        f"{name} {rows.duration(value)} ({rows.quotient(times.get('one by one'), value)})"
        for name, value in times.items()
    )
    return f"{row['threads']} thread(s) {row['shape']['name']}, an image  {words}"


def main(
    arguments: list[str] | None = None,
    sizes: dict[str, tuple[int, int]] | None = None,
    overrides: list[Any] | None = None,
) -> int:
    """Measures what the arguments say; `overrides` are config keys and values. Returns the exit status."""
    options = command_line.parser(__doc__ or "", "three repeats of 8 small images", repeats=5)
    options.add_argument("--images", type=int, default=IMAGES)
    options.add_argument("--sizes", nargs="+", choices=list(SIZES), help="default: all")
    options.add_argument("--contestants", nargs="+", metavar="NAME", help="besides one by one; default: all")
    parsed = command_line.parse(options, arguments)
    if parsed.dtype != "float32":
        options.error("--dtype: only float32 is measured")
    sizes = sizes or {name: SIZES[name] for name in parsed.sizes or SIZES}
    if parsed.quick:
        parsed.repeats, parsed.images, sizes = min(parsed.repeats, 3), 8, dict([*sizes.items()][:1])
    results = Results(parsed.output, "predict", parsed.device)
    measure_time(parsed, sizes, overrides or [], results)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
