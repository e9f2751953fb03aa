# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""How fast an exported model runs on a CPU: PyTorch with our operators, ONNX Runtime and OpenVINO.

    python -m benchmarks.runtimes                       1 thread and all threads
    python -m benchmarks.runtimes --parts backbone      only ResNet-50 and FPN
    python -m benchmarks.runtimes --quick               three repeats, on an image of half the height and width

The model is a Faster R-CNN R-50-FPN with mdconv c3-c5; parts are its backbone, from pixels to feature maps, and the
whole detector, from pixels to boxes. It is exported for a batch of one image of a fixed size, which suits runtimes
best. Contestants run alternately in one process, in float32. Weights are random; offsets are about N(0, 2^2) pixels,
and scores are spread so that boxes are found. With one thread a time is the process's CPU time, else the wall time.

Before a part is timed its outputs are compared with PyTorch's. A runtime that raises, computes something else or is not
installed drops out, and the row says why. If it is our model in PyTorch that raises the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run by the file's name, without -m

from dcn_d2.quiet import silence_detectron2_warnings

silence_detectron2_warnings()  # before Detectron2 is imported

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from benchmarks import command_line, detector, measure, predict, rows
from benchmarks.failures import Failures, attempt, note
from benchmarks.results import Results
from dcn_d2.engine import DCNPredictor
from dcn_d2.export import export
from dcn_d2.export.formats import SUFFIXES, open_session

PARTS = ("backbone", "detector")
RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino"}  # the format that each reads
MOST_SECONDS = 120.0  # per contestant and row
TOLERANCE = 1e-3  # how far feature maps may differ, relative to the largest value
Arrays = dict[str, np.ndarray]


class Part:
    """A part of the model, its input, and its files for the runtimes.

    Args:
        name: one of PARTS.
        predictor: with the model in evaluation mode, and its config.
        image: (3, H, W), uint8.
        folder: where the exported files go.
    """

    def __init__(self, name: str, predictor: DCNPredictor, image: torch.Tensor, folder: Path) -> None:
        self.name, self.cfg, self.model = name, predictor.cfg, predictor.model
        self.image, self.folder = image, folder
        self.size = (image.shape[-2], image.shape[-1])
        self.arrays = {"images": image[None].float().numpy(), "image_sizes": np.array([self.size], np.int64)}

    def export(self, failed: Failures) -> dict[str, Path]:
        """Writes a file for each runtime; notes in `failed` for which that is not possible."""
        files: dict[str, Path] = {}
        for runtime, file_format in RUNTIMES.items():
            path = self.folder / f"{self.name}{SUFFIXES[file_format]}"
            write = partial(export, model=self.model, part=self.name, size=self.size, batch=1, check=False)
            if attempt(failed, runtime, write, self.cfg, path):
                files[runtime] = path
        return files

    def eager(self) -> Arrays:
        """What the model gives in PyTorch."""
        height, width = self.size
        inputs = [{"image": self.image, "height": height, "width": width}]
        with torch.no_grad():
            if self.name == "backbone":
                features = self.model.backbone(self.model.preprocess_image(inputs).tensor)
                return {name: level.numpy() for name, level in features.items()}
            found = self.model(inputs)[0]["instances"]
        return {
            "boxes": found.pred_boxes.tensor.numpy()[None],
            "scores": found.scores.numpy()[None],
            "classes": found.pred_classes.numpy()[None],
        }

    def contestants(self, files: dict[str, Path], threads: int, failed: Failures) -> dict[str, Callable[[], Arrays]]:
        """The model in PyTorch and in each runtime that can load its file, ready to be called."""
        sessions = {name: attempt(failed, name, open_session, path, threads) for name, path in files.items()}
        ready = {name: partial(session.run, self.arrays) for name, session in sessions.items() if session}
        return {"dcn_d2": self.eager, **ready}

    def check_equal(self, calls: dict[str, Callable[[], Arrays]], failed: Failures) -> None:
        """Notes in `failed` whose outputs are not those of PyTorch."""
        outputs = {name: attempt(failed, name, call) for name, call in calls.items()}
        expected = outputs.pop("dcn_d2")
        for name, actual in outputs.items():
            if actual is not None and expected is not None:
                compare = different_features if self.name == "backbone" else different_boxes
                reason = attempt(failed, name, compare, actual, expected)
                if reason:
                    note(failed, name, reason)


def different_features(actual: Arrays, expected: Arrays) -> str:
    """Says which feature map differs from PyTorch's by more than the tolerance; "" if none does."""
    for level, values in expected.items():
        error = np.abs(actual[level] - values).max() / np.abs(values).max()
        if not error <= TOLERANCE:
            return f"its {level} differs from PyTorch's by {error:.3g} (relative)"
    return ""


def different_boxes(actual: Arrays, expected: Arrays) -> str:
    """Says how many boxes are PyTorch's if they are too few; "" if enough are."""
    equal, total = predict.equal_boxes(instances(actual), instances(expected))
    few = not total or equal < predict.LEAST_EQUAL * total
    return f"only {equal} of {total} boxes are PyTorch's" if few else ""


def instances(arrays: Arrays) -> Instances:
    """The detections of the first image; places of the outputs that hold none have the class -1."""
    boxes, scores, classes = (torch.from_numpy(np.array(arrays[name][0])) for name in ("boxes", "scores", "classes"))
    real = classes >= 0
    fields = {"pred_boxes": Boxes(boxes[real]), "scores": scores[real], "pred_classes": classes[real]}
    return Instances((1, 1), **fields)  # the size does not matter


def build(size: tuple[int, int], overrides: list[Any], folder: Path) -> tuple[DCNPredictor, torch.Tensor]:
    """A predictor whose scores are spread so that it finds boxes, and an image."""
    predictor = predict.build(size, "cpu", overrides)
    (file,) = predict.write_images(folder, 1, size)
    predict.spread_scores(predictor, file)
    pixels = np.asarray(Image.open(file))[:, :, ::-1]
    return predictor, torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def measure_time(arguments: argparse.Namespace, size: tuple[int, int], overrides: list[Any], results: Results) -> None:
    """Times every part and number of threads; a row and a line for each."""
    shape = {"name": "R-50-FPN", "height": size[0], "width": size[1], "batch": 1}
    with tempfile.TemporaryDirectory() as folder:
        predictor, image = build(size, overrides, Path(folder))
        for name in arguments.parts:
            part = Part(name, predictor, image, Path(folder))
            not_exported: Failures = {}
            files = part.export(not_exported)
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                row = {"shape": shape, "pass": name, "dtype": arguments.dtype, "threads": threads}
                failed = dict(not_exported)
                calls = part.contestants(files, threads, failed)
                part.check_equal(calls, failed)
                clock = time.process_time if threads == 1 else time.perf_counter
                row |= measure.interleave({**calls}, "cpu", arguments.repeats, failed, MOST_SECONDS, clock=clock)
                results.add(row, failed, describe)


def describe(row: dict[str, Any]) -> str:
    """One line: the times, and how much faster each is than PyTorch."""
    times = {name: timing["median"] for name, timing in row["milliseconds"].items()}
    words = "  ".join(
        f"{name} {rows.duration(value)} ({rows.quotient(times.get('dcn_d2'), value)}x)" for name, value in times.items()
    )
    return f"{row['threads']} thread(s) {row['pass']:8s}  {words}"


def main(arguments: list[str] | None = None, size: tuple[int, int] = detector.SIZE, overrides: Any = ()) -> int:
    """Measures what the arguments say; `overrides` are config keys and values. Returns the exit status."""
    options = command_line.parser(__doc__ or "", "three repeats on an image of half the size", repeats=7)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parsed = command_line.parse(options, arguments)
    if (parsed.device, parsed.dtype) != ("cpu", "float32"):
        options.error(f"only the CPU and float32 are measured, got --device {parsed.device} --dtype {parsed.dtype}")
    if parsed.quick:
        parsed.repeats, size = min(parsed.repeats, 3), (size[0] // 2, size[1] // 2)
    results = Results(parsed.output, "runtimes", parsed.device)
    measure_time(parsed, size, [*overrides], results)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
