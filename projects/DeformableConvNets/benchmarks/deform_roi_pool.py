# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable RoI pooling against torchvision's RoIAlign, which is not deformable, with as many samples a bin.

    python -m benchmarks.deform_roi_pool                     the CPU, 1 thread and all threads
    python -m benchmarks.deform_roi_pool --device cuda       the GPU
    python -m benchmarks.deform_roi_pool --quick             2 x 2 samples a bin only
    python -m benchmarks.deform_roi_pool --check FILE...     which goals hold

512 RoIs of a size that fits the level, 256 channels, 7 x 7 bins, on an FPN's maps of an image of 800 x 1216. Sampling 0
takes as many samples as a bin has pixels; `deform_psroi_pool` has no such mode. Operators are timed alternately in one
process; the table shows medians in the faster memory format, the file under results/ has both and the spread.

Before a shape is timed all operators run once, and those that should agree with RoIAlign in float32 are compared with
it. One that raises or computes something else drops out, and the row says why. If it is ours the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run by the file's name, without -m

from benchmarks import command_line, measure, on_cuda, rows
from benchmarks.failures import Failures, attempt, note
from benchmarks.measure import Calls, prepare
from benchmarks.results import Results
from dcn_d2.ops import deform_psroi_pool, deform_roi_pool

MODES = ("plain", "deformable", "modulated", "psroi")
# How far values may differ from a computation in float32, relative to the largest value.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Shape:
    """One level: a map of `height` x `width` at 1 / `stride` of the image, and RoIs of about `roi_size` pixels."""

    name: str
    height: int
    width: int
    stride: int
    roi_size: int
    rois: int = 512
    channels: int = 256
    bins: int = 7
    batch: int = 1


LEVELS = [Shape("p2", 200, 304, 4, 56), Shape("p3", 100, 152, 8, 112), Shape("p4", 50, 76, 16, 224)]


def draw_rois(shape: Shape, generator: torch.Generator) -> Tensor:
    """RoIs with centres anywhere, sides of 0.5 to 2 times `roi_size`, clipped to the image as proposals are."""
    sides = shape.roi_size * 2 ** (torch.rand(shape.rois, 2, generator=generator) * 2 - 1)
    image = torch.tensor([shape.width, shape.height]) * shape.stride
    centres = torch.rand(shape.rois, 2, generator=generator) * image
    corners = [(centres + sign * sides / 2).clamp(min=torch.zeros(2), max=image) for sign in (-1, 1)]
    batch = torch.arange(shape.rois) % shape.batch
    return torch.cat([batch[:, None], *corners], dim=1)


class Pooling:
    """The operands of one shape, and the contestants that run it."""

    def __init__(self, shape: Shape, sampling: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype)

        self.shape, self.sampling = shape, sampling
        # Rounded, as torchvision takes RoIs only in the dtype of the input, and has no kernels for bfloat16.
        self.peer_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        self.rois = draw_rois(shape, generator).to(device, self.peer_dtype).float()
        self.input = normal(shape.batch, shape.channels, shape.height, shape.width)
        self.offset = normal(shape.rois, 2, shape.bins, shape.bins)  # times gamma: a tenth of the RoI's size
        self.mask = normal(shape.rois, 1, shape.bins, shape.bins).sigmoid()
        self.grad = normal(shape.rois, shape.channels, shape.bins, shape.bins)

    def roi_align(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Torchvision's operator, computed in `dtype`, by default in the dtype that it can take."""
        x, rois = (t.to(dtype or self.peer_dtype) for t in (x, self.rois))
        scale, bins = 1 / self.shape.stride, self.shape.bins
        pooled = torchvision.ops.roi_align(x, rois, bins, scale, self.sampling or -1, aligned=True)
        return pooled.to(dtype or self.input.dtype)

    def deformable(self, x: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Our `deform_roi_pool`."""
        scale = 1 / self.shape.stride
        return deform_roi_pool(x, self.rois, offset, self.shape.bins, scale, self.sampling, mask=mask)

    def position_sensitive(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Our `deform_psroi_pool`."""
        scale, bins = 1 / self.shape.stride, self.shape.bins
        return deform_psroi_pool(x, self.rois, offset, bins, scale, sample_per_part=self.sampling, mask=mask)

    def contestants(self, backward: bool) -> Calls:
        """Every operator in both memory formats, ready to be called; `backward` is by all its operands."""
        found = {"roi_align NCHW": prepare(self.roi_align, (self.input,), self.grad, backward)}
        moved = (self.offset, self.mask)
        for layout, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            x, grad = (t.contiguous(memory_format=memory_format) for t in (self.input, self.grad))
            found[f"plain {layout}"] = prepare(self.deformable, (x,), grad, backward)
            found[f"deformable {layout}"] = prepare(self.deformable, (x, self.offset), grad, backward)
            found[f"modulated {layout}"] = prepare(self.deformable, (x, *moved), grad, backward)
            if self.sampling:
                found[f"psroi {layout}"] = prepare(self.position_sensitive, (x, *moved), grad, backward)
            if backward and x.device.type == "cuda":
                found[f"deterministic {layout}"] = on_cuda.deterministic(found[f"modulated {layout}"])
        return found

    def check(self, backward: bool, failed: Failures) -> None:
        """Compares outputs, once: gradients are not compared."""
        if not backward:
            failed |= check_equal(self)

    def calls(self, backward: bool, buffers: str, failed: Failures) -> Calls:
        """All contestants, for `measure.time_cases`."""
        return self.contestants(backward)


def check_equal(pooling: Pooling) -> Failures:
    """Returns who raises or does not compute what it should, and why.

    RoIAlign itself is not compared: in float16 its coordinates are float16 too, and off by some tenths.
    """
    failed: Failures = {}
    calls = pooling.contestants(backward=False)
    results = {name: attempt(failed, name, call) for name, call in calls.items()}
    still, ones = torch.zeros_like(pooling.offset), torch.ones_like(pooling.mask)
    with torch.no_grad():
        still_pooled = attempt(failed, "modulated NCHW", pooling.deformable, pooling.input, still, ones)
        expected = attempt(failed, "reference", pooling.roi_align, pooling.input, torch.float32)
    comparisons = [(name, results[name], expected, "roi_align") for name in ("plain NCHW", "plain NHWC")]
    comparisons.append(("modulated NCHW", still_pooled, expected, "roi_align where nothing moves"))
    for name in results:
        if name.endswith("NHWC"):
            other = name.replace("NHWC", "NCHW")
            comparisons.append((name, results[name], results[other], other))
    for name, actual, wanted, other in comparisons:
        if name not in failed and actual is not None and wanted is not None:
            error = float((actual.float() - wanted.float()).abs().max() / wanted.float().abs().max())
            if not error <= TOLERANCES[pooling.input.dtype]:
                note(failed, name, f"differs from {other} by {error:.3g} (relative)")
    return failed


def measure_time(arguments: argparse.Namespace, levels: list[Shape], results: Results) -> None:
    """Times every level, sampling, pass and number of threads; a row and a line for each."""
    dtype = on_cuda.set_precision(arguments.dtype)
    cases = [
        (asdict(shape) | {"sampling": sampling}, partial(Pooling, shape, sampling, arguments.device, dtype))
        for shape in levels
        for sampling in ((2,) if arguments.quick else (0, 2, 4))
    ]
    measure.time_cases(cases, arguments, results, describe)


def describe(row: dict[str, Any]) -> str:
    """One line: RoIAlign's time, and for each operator its time and how many times faster it is."""
    align = rows.fastest(row, "roi_align")
    times = {mode: rows.fastest(row, mode) for mode in MODES}
    ours = "  ".join(
        f"{mode} {rows.duration(time)} ({rows.quotient(align, time, 1)}x)" for mode, time in times.items() if time
    )
    shape = row["shape"]
    label = f"{shape['name']} sampling {shape['sampling']}"
    return f"{row['threads']} thread(s) {row['pass']:16s} {label:14s} roi_align {rows.duration(align):>8s}  {ours}"


def main(arguments: list[str] | None = None, levels: list[Shape] = LEVELS) -> int:
    """Measures what the arguments say and writes the results; returns the exit status."""
    parsed = command_line.parse(command_line.parser(__doc__ or "", "only 2 x 2 samples a bin", repeats=9), arguments)
    results = Results(parsed.output, "deform_roi_pool", parsed.device)
    measure_time(parsed, levels, results)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
