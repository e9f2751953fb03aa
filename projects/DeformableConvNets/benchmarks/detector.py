# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What deformable convolutions cost a whole model: Faster R-CNN R-50-FPN with mdconv c3-c5, against the same without.

    python -m benchmarks.detector                     the CPU, 1 thread and all threads
    python -m benchmarks.detector --device cuda       the GPU, also a training iteration with mixed precision
    python -m benchmarks.detector --quick             three repeats, on an image of half the height and width
    python -m benchmarks.detector --check FILE...     which goals hold

Parts are the ResNet alone (trunk), the detector from image to boxes (inference), and forward, backward and optimizer
step (training). Contestants are the plain model, ours, and ours with torchvision's operator in its layers. Weights are
random and the same in all of them; offset branches are scaled so that offsets are about N(0, 1.5^2) pixels. On the GPU
training uses float16 unless another 16-bit dtype is given.

A contestant drops out if it raises, if its trunk's features differ from the other contestants', or if it pools fewer
boxes than another. Its row says why. If it is not torchvision's the exit status is 1.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run by the file's name, without -m

from dcn_d2.quiet import silence_detectron2_warnings

silence_detectron2_warnings()  # before Detectron2 is imported

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from benchmarks import command_line, measure, on_cuda, rows
from benchmarks.failures import Failures, attempt, dropped, note
from benchmarks.measure import Calls
from benchmarks.results import Results
from dcn_d2 import model_zoo
from dcn_d2.layers import deform_conv, split_offset_and_mask
from dcn_d2.modeling import DeformBottleneckBlock

ROW = "faster_rcnn_R_50_FPN_1x_mdconv_c3-c5"
SIZE = (800, 1216)
OFFSET_SPREAD = 1.5
MOST_SECONDS = 60.0  # per contestant and row
# How far features may differ, relative to the largest one.
TOLERANCES = {"float32": 2e-3, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 0.1}


def configs(overrides: list[Any], device: str) -> dict[str, CfgNode]:
    """The configs of the deformable and of the plain model, which differ in one key."""
    deformable = model_zoo.get_config(ROW)
    deformable.merge_from_list(["MODEL.DEVICE", device, "MODEL.DCN.MEMORY_FORMAT", "contiguous", *overrides])
    plain = deformable.clone()
    plain.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    return {"plain": plain, "dcn_d2": deformable}


def build(overrides: list[Any], device: str, images: Tensor) -> dict[str, Any]:
    """Both models in evaluation mode, with the same weights where both have them."""
    models: dict[str, Any] = {}
    for name, cfg in configs(overrides, device).items():
        torch.manual_seed(0)
        models[name] = build_model(cfg).eval()
    deformable, plain = models["dcn_d2"], models["plain"]
    for name, weight in deformable.state_dict().items():
        if name.startswith("backbone.bottom_up") and name.endswith("conv3.norm.weight"):
            weight.fill_(0.3)  # otherwise each of the 16 blocks would double the variance of its input
    missing, _ = plain.load_state_dict(deformable.state_dict(), strict=False)
    if missing:
        raise RuntimeError(f"the plain model has weights that the deformable one lacks: {missing}")
    _scale_offsets(deformable, images)
    return models


def _scale_offsets(model: Any, images: Tensor) -> None:
    """Fills offset branches, block by block as the features flow, so that they predict N(0, OFFSET_SPREAD^2)."""

    def fill(branch: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        weight = branch.weight
        nn.init.normal_(weight)
        outputs = nn.functional.conv2d(inputs[0], weight, None, branch.stride, branch.padding, branch.dilation)
        outputs -= outputs.mean((0, 2, 3), keepdim=True)
        factor = OFFSET_SPREAD / outputs.std()
        weight.mul_(factor)
        outputs = nn.functional.conv2d(inputs[0], weight, None, branch.stride, branch.padding, branch.dilation)
        branch.bias.copy_(-outputs.mean((0, 2, 3)))
        return outputs + branch.bias[:, None, None]

    blocks = [module for module in model.modules() if isinstance(module, DeformBottleneckBlock)]
    hooks = [block.conv2_offset.register_forward_hook(fill) for block in blocks]
    with torch.no_grad():
        model.backbone.bottom_up(images)
    for hook in hooks:
        hook.remove()


def _torchvision_by_branch(
    input: Tensor, offset_and_mask: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any
) -> Tensor:
    """Torchvision's operator in float32, as autocast runs it on a GPU. On CPU autocast has no rule for it."""
    offset, mask = split_offset_and_mask(offset_and_mask.float())
    bias = None if bias is None else bias.float()
    output = torchvision.ops.deform_conv2d(input.float(), offset, weight.float(), bias, *geometry, mask)
    return output.to(input.dtype)


class Detector:
    """The models, their inputs, and the contestants of each part."""

    def __init__(self, size: tuple[int, int], overrides: list[Any], device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.size, self.device, self.dtype = size, device, dtype
        self.pixels = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        self.images = torch.randn(1, 3, *size, generator=generator).to(device)  # normalised ones, for the trunk
        self.models = {f"{name} NCHW": m for name, m in build(overrides, device, self.images).items()}
        for name, model in list(self.models.items()):
            self.models[name.replace("NCHW", "NHWC")] = copy.deepcopy(model).to(memory_format=torch.channels_last)
        corners = torch.rand(10, 2, generator=generator) * torch.tensor([size[1], size[0]]) * 0.7
        boxes = torch.cat([corners, corners + torch.tensor([size[1], size[0]]) * 0.25], dim=1)
        classes = torch.randint(0, 80, (10,), generator=generator)
        self.truth = Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)

    def contestants(self, part: str) -> Calls:
        """Every model, and the deformable one with torchvision's operator, ready to be called."""
        make = {"trunk": self._trunk, "inference": self._inference, "training": self._training}[part]
        found = {name: make(model, name) for name, model in self.models.items()}
        theirs = make(self.models["dcn_d2 NCHW"], "torchvision NCHW")

        def with_their_operator() -> object:
            with mock.patch.object(deform_conv, "modulated_deform_conv2d", _torchvision_by_branch):
                return theirs()

        return found | {"torchvision NCHW": with_their_operator}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def _trunk(self, model: Any, name: str) -> Callable[[], object]:
        layout = torch.channels_last if name.endswith("NHWC") else torch.contiguous_format
        images = self.images.contiguous(memory_format=layout)

        def call() -> object:
            with torch.no_grad(), self._autocast():
                return model.eval().backbone.bottom_up(images)

        return call

    def _inference(self, model: Any, name: str) -> Callable[[], object]:
        inputs = [{"image": self.pixels, "height": self.size[0], "width": self.size[1]}]

        def call() -> object:
            with torch.no_grad(), self._autocast():
                return model.eval()(inputs)

        return call

    def _training(self, model: Any, name: str) -> Callable[[], object]:
        inputs = [{"image": self.pixels, "instances": self.truth}]
        model = copy.deepcopy(model)  # its weights change
        weights = [p for p in model.parameters() if p.requires_grad]
        # The rate is so small that the work stays the same, and the first scale so small that no step is skipped.
        optimizer = torch.optim.SGD(weights, lr=1e-8, momentum=0.9)
        scaler = torch.amp.GradScaler(self.device, init_scale=64.0, enabled=self.dtype == torch.float16)

        def call() -> object:
            with EventStorage(), self._autocast():
                loss = sum(model.train()(inputs).values())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            return loss

        return call


def check_equal(detector: Detector, tolerance: float) -> Failures:
    """Returns whose trunk differs from the others', or who has fewer proposals than others, and why."""
    failed: Failures = {}
    outputs: dict[str, Any] = {
        name: attempt(failed, name, call) for name, call in detector.contestants("trunk").items()
    }
    for name, other in (
        ("plain NHWC", "plain NCHW"),
        ("dcn_d2 NHWC", "dcn_d2 NCHW"),
        ("dcn_d2 NCHW", "torchvision NCHW"),
        ("dcn_d2 NHWC", "torchvision NCHW"),
    ):
        for level, expected in (outputs[other] or {}).items() if outputs[name] else ():
            error = float((outputs[name][level] - expected).float().abs().max() / expected.float().abs().max())
            if not error <= tolerance:
                note(failed, name, f"its trunk differs from {other} in {level} by {error:.3g} (relative)")
    counts = {}
    for name, model in detector.models.items():
        found: list[int] = []
        hook = model.proposal_generator.register_forward_hook(
            lambda module, inputs, output, found=found: found.append(len(output[0][0]))
        )
        attempt(failed, name, detector._inference(model, name))
        hook.remove()
        counts[name] = sum(found)
    for name, count in counts.items():
        if not dropped(failed, name) and count < 0.9 * max(counts.values()):
            note(failed, name, f"pools {count} boxes, another model {max(counts.values())}")
    return failed


def measure_time(arguments: argparse.Namespace, size: tuple[int, int], overrides: list[Any], results: Results) -> None:
    """Times every part and number of threads; a row and a line for each."""
    detectors: dict[str, Detector | None] = {}
    wrong: dict[str, Failures] = {}
    shape = {"name": "R-50-FPN", "height": size[0], "width": size[1], "batch": 1}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for part in arguments.parts:
            dtype = arguments.dtype
            if arguments.device == "cuda":
                dtype = "float16" if part == "training" and dtype in ("float32", "tf32") else dtype
                on_cuda.set_precision(dtype, tune=False)  # Detectron2's default is not to tune, as sizes vary
            if dtype not in detectors:
                wrong[dtype] = {}
                torch_dtype = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
                models = (size, overrides, arguments.device, torch_dtype)
                detector = detectors[dtype] = attempt(wrong[dtype], "models", Detector, *models)
                if detector:
                    wrong[dtype] |= attempt(wrong[dtype], "models", check_equal, detector, TOLERANCES[dtype]) or {}
            row = {"shape": shape, "pass": part, "dtype": dtype, "threads": threads, "milliseconds": {}}
            failed = dict(wrong[dtype])
            if detector := detectors[dtype]:
                calls = attempt(failed, "models", detector.contestants, part) or {}
                row |= measure.interleave(calls, arguments.device, arguments.repeats, failed, MOST_SECONDS)
            results.add(row, failed, describe)


def describe(row: dict[str, Any]) -> str:
    """One line: times and the prices in both memory formats."""
    times = {name: timing["median"] for name, timing in row["milliseconds"].items()}

    def price(name: str, layout: str) -> str:
        return rows.quotient(times.get(f"{name} {layout}"), times.get(f"plain {layout}"), 3)

    prices = ", ".join(f"{price('dcn_d2', layout)} {layout}" for layout in ("NCHW", "NHWC"))
    words = "  ".join(f"{name} {rows.duration(time)}" for name, time in times.items())
    label = f"{row['threads']} thread(s) {row['pass']:9s} {row['dtype']}"
    return f"{label}  {words}  price {prices}, {price('torchvision', 'NCHW')} torchvision"


def main(arguments: list[str] | None = None, size: tuple[int, int] = SIZE, overrides: list[Any] | None = None) -> int:
    """Measures what the arguments say; `overrides` are config keys and values. Returns the exit status."""
    options = command_line.parser(__doc__ or "", "three repeats on an image of half the size", repeats=7)
    parts = ["trunk", "inference", "training"]
    options.add_argument("--parts", nargs="+", choices=parts, help="default: all on CUDA, no training on CPU")
    parsed = command_line.parse(options, arguments)
    parsed.parts = parsed.parts or (parts if parsed.device == "cuda" else parts[:2])
    if parsed.quick:
        parsed.repeats, size = min(parsed.repeats, 3), (size[0] // 2, size[1] // 2)
    results = Results(parsed.output, "detector", parsed.device)
    measure_time(parsed, size, overrides or [], results)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
