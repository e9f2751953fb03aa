# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What mixed precision in bfloat16 gains in training on a CPU: iterations in float32 and under autocast, alternately.

    python -m benchmarks.training_precision                     the example's detector and a row of the zoo
    python -m benchmarks.training_precision --quick             fewer repeats, and only the example's detector

An iteration is forward, backward and the optimizer's step, as the trainer makes them. Models are the example's detector
in batches of 4 images of 256 x 256, and Faster R-CNN R-50-FPN with mdconv c3-c5 on one image of 320 x 480. Weights and
images are random. `dcn_d2.engine.precision` decides by these numbers which processors train in bfloat16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run by the file's name, without -m

from dcn_d2.quiet import silence_detectron2_warnings

silence_detectron2_warnings()  # before Detectron2 is imported

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from benchmarks import command_line, measure, rows
from benchmarks.failures import Failures, attempt
from benchmarks.measure import Calls
from benchmarks.results import Results
from dcn_d2 import model_zoo
from dcn_d2.engine import DCNTrainer, load_config
from dcn_d2.engine.steps import build_steps

PROJECT = Path(__file__).resolve().parent.parent
EXAMPLE = "examples/nuclei_faster_rcnn_slim_R_50_FPN_mdconv_c3-c5.yaml"
ROW = "faster_rcnn_R_50_FPN_1x_mdconv_c3-c5"
MOST_SECONDS = 120.0  # per contestant and row


def example_config() -> CfgNode:
    """The config of the example's detector."""
    return load_config(str(PROJECT / EXAMPLE), [])


def cases(quick: bool) -> list[tuple[dict[str, Any], CfgNode]]:
    """What a row says of its shape, and the config of its model."""
    found = [({"name": "example", "height": 256, "width": 256, "batch": 4}, example_config())]
    if not quick:
        found.append(({"name": "R-50-FPN", "height": 320, "width": 480, "batch": 1}, model_zoo.get_config(ROW)))
    return found


def make_batch(shape: dict[str, Any], classes: int) -> list[dict[str, Any]]:
    """Images of noise with 10 boxes each."""
    generator = torch.Generator().manual_seed(0)
    size = (shape["height"], shape["width"])
    batch = []
    for _ in range(shape["batch"]):
        corners = torch.rand(10, 2, generator=generator) * torch.tensor([size[1], size[0]]) * 0.7
        boxes = torch.cat([corners, corners + torch.tensor([size[1], size[0]]) * 0.25], dim=1)
        labels = torch.randint(0, classes, (10,), generator=generator)
        pixels = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        batch.append({"image": pixels, "instances": Instances(size, gt_boxes=Boxes(boxes), gt_classes=labels)})
    return batch


def contestants(shape: dict[str, Any], cfg: CfgNode) -> Calls:
    """An iteration of the trainer in each precision, ready to be called."""
    batch = make_batch(shape, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    return {name: _iteration(cfg, batch, name) for name in ("float32", "bfloat16")}


def _iteration(cfg: CfgNode, batch: list[dict[str, Any]], dtype: str) -> Callable[[], object]:
    cfg = cfg.clone()
    # The rate is so small that the work stays the same.
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "SOLVER.BASE_LR", 1e-8])
    cfg.merge_from_list(["SOLVER.AMP.ENABLED", dtype != "float32"])
    cfg.merge_from_list(["SOLVER.AMP.DTYPE", "auto" if dtype == "float32" else dtype])
    torch.manual_seed(0)
    model = DCNTrainer.build_model(cfg)
    for name, weight in model.state_dict().items():
        if name.startswith("backbone.bottom_up") and name.endswith("conv3.norm.weight"):
            weight.fill_(0.3)  # otherwise each of the 16 blocks would double the variance of its input
    steps = build_steps(cfg, model, [batch] * 10_000, DCNTrainer.build_optimizer(cfg, model))

    def call() -> object:
        with EventStorage():
            return steps.run_step()

    return call


def measure_time(arguments: argparse.Namespace, chosen: list[tuple[dict[str, Any], CfgNode]], results: Results) -> None:
    """Times every model and number of threads; a row and a line for each."""
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape, cfg in chosen:
            row = {"shape": shape, "pass": "training", "threads": threads, "milliseconds": {}}
            failed: Failures = {}
            calls = attempt(failed, "models", contestants, shape, cfg) or {}
            row |= measure.interleave(calls, arguments.device, arguments.repeats, failed, MOST_SECONDS)
            results.add(row, failed, describe)


def describe(row: dict[str, Any]) -> str:
    """One line: both times, and the gain."""
    times = {name: timing["median"] for name, timing in row["milliseconds"].items()}
    words = "  ".join(f"{name} {rows.duration(time)}" for name, time in times.items())
    gain = rows.quotient(times.get("float32"), times.get("bfloat16"), 3)
    return f"{row['threads']} thread(s) {row['shape']['name']:9s} {words}  float32/bfloat16 {gain}"


def main(arguments: list[str] | None = None, chosen: list[tuple[dict[str, Any], CfgNode]] | None = None) -> int:
    """Measures what the arguments say; `chosen` replaces `cases`. Returns the exit status."""
    options = command_line.parser(__doc__ or "", "three repeats, and only the example's detector", repeats=9)
    parsed = command_line.parse(options, arguments)
    if parsed.device != "cpu" or parsed.dtype != "float32":
        options.error("it compares float32 and bfloat16 on a CPU: --device and --dtype cannot be chosen")
    if parsed.quick:
        parsed.repeats = min(parsed.repeats, 3)
    results = Results(parsed.output, "training_precision", "cpu")
    measure_time(parsed, chosen or cases(parsed.quick), results)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
