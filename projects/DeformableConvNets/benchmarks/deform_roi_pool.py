# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable RoI pooling against torchvision's RoIAlign, which is not deformable, with as many samples a bin.

    python benchmarks/deform_roi_pool.py                     the CPU, 1 thread and all threads
    python benchmarks/deform_roi_pool.py --device cuda       the GPU
    python benchmarks/deform_roi_pool.py --quick             2 x 2 samples a bin only
    python benchmarks/deform_roi_pool.py --check FILE...     which goals hold

512 RoIs of a size that fits the level, 256 channels, 7 x 7 bins, on an FPN's maps of an image of 800 x 1216. Sampling 0
takes as many samples as a bin has pixels; `deform_psroi_pool` has no such mode. Operators are timed in turns in one
process; the table shows medians in the faster memory format, the file under results/ has both and the spread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import goals
import measure
import on_cuda
import torch
import torchvision
from measure import LAST, prepare
from torch import Tensor

from dcn_d2.ops import deform_psroi_pool, deform_roi_pool

MODES = ("plain", "deformable", "modulated", "psroi")


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
        # Rounded to what torchvision can take: it wants them in the input's dtype, and has no kernels for bfloat16.
        self.peer_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        self.rois = draw_rois(shape, generator).to(device, self.peer_dtype).float()
        self.input = normal(shape.batch, shape.channels, shape.height, shape.width)
        self.offset = normal(shape.rois, 2, shape.bins, shape.bins)  # times gamma: a tenth of the RoI's size
        self.mask = normal(shape.rois, 1, shape.bins, shape.bins).sigmoid()
        self.grad = normal(shape.rois, shape.channels, shape.bins, shape.bins)

    def roi_align(self, x: Tensor) -> Tensor:
        x, rois, bins = x.to(self.peer_dtype), self.rois.to(self.peer_dtype), self.shape.bins
        pooled = torchvision.ops.roi_align(x, rois, bins, 1 / self.shape.stride, self.sampling or -1, aligned=True)
        return pooled.to(self.input.dtype)

    def deformable(self, x: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        scale = 1 / self.shape.stride
        return deform_roi_pool(x, self.rois, offset, self.shape.bins, scale, self.sampling, mask=mask)

    def position_sensitive(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        scale, bins = 1 / self.shape.stride, self.shape.bins
        return deform_psroi_pool(x, self.rois, offset, bins, scale, sample_per_part=self.sampling, mask=mask)

    def contestants(self, backward: bool) -> dict[str, Callable[[], object]]:
        """Every operator in both memory formats, ready to be called; gradients are those of all its operands."""
        found = {"roi_align NCHW": prepare(self.roi_align, (self.input,), self.grad, backward)}
        moved = (self.offset, self.mask)
        for layout, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", LAST)):
            x, grad = (t.contiguous(memory_format=memory_format) for t in (self.input, self.grad))
            found[f"plain {layout}"] = prepare(self.deformable, (x,), grad, backward)
            found[f"deformable {layout}"] = prepare(self.deformable, (x, self.offset), grad, backward)
            found[f"modulated {layout}"] = prepare(self.deformable, (x, *moved), grad, backward)
            if self.sampling:
                found[f"psroi {layout}"] = prepare(self.position_sensitive, (x, *moved), grad, backward)
            if backward and x.device.type == "cuda":
                found[f"deterministic {layout}"] = on_cuda.deterministic(found[f"modulated {layout}"])
        return found


def check_equal(pooling: Pooling) -> None:
    """Refuses to time operators that do not compute the same where they should."""
    results: dict[str, Any] = {name: call() for name, call in pooling.contestants(backward=False).items()}
    with torch.no_grad():
        still, ones = torch.zeros_like(pooling.offset), torch.ones_like(pooling.mask)
        results["modulated, without offsets"] = pooling.deformable(pooling.input, still, ones)
    pairs = [(name, "roi_align NCHW") for name in ("plain NCHW", "plain NHWC", "modulated, without offsets")]
    pairs += [(name, name.replace("NHWC", "NCHW")) for name in results if name.endswith("NHWC")]
    for name, other in pairs:
        actual, expected = results[name].float(), results[other].float()
        error = float((actual - expected).abs().max() / expected.abs().max())
        if not error <= (1e-4 if pooling.input.dtype == torch.float32 else 3e-2):
            raise RuntimeError(f"{name} differs from {other} by {error} (relative) at {pooling.shape}")


def measure_time(arguments: argparse.Namespace, levels: list[Shape]) -> list[dict[str, Any]]:
    """Times every level, sampling, pass and number of threads; prints a line for each."""
    rows = []
    cuda = arguments.device == "cuda"
    dtype = on_cuda.set_precision(arguments.dtype) if cuda else getattr(torch, arguments.dtype)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape in levels:
            for sampling in (2,) if arguments.quick else (0, 2, 4):
                pooling = Pooling(shape, sampling, arguments.device, dtype)
                check_equal(pooling)
                for direction in ("forward", "forward+backward"):
                    timings = measure.interleave(
                        pooling.contestants(direction != "forward"), arguments.device, arguments.repeats, ahead=cuda
                    )
                    rows.append(
                        {"shape": asdict(shape) | {"sampling": sampling}, "pass": direction}
                        | {"dtype": arguments.dtype, "threads": threads}
                        | {"milliseconds": {name: asdict(timing) for name, timing in timings.items()}}
                    )
                    print(describe(rows[-1]), flush=True)
    return rows


def describe(row: dict[str, Any]) -> str:
    """One line: RoIAlign's time, and for each operator its time and how many times faster it is."""
    times = {name: timing["median"] for name, timing in row["milliseconds"].items()}
    align = times["roi_align NCHW"]
    fastest = {mode: min((t for name, t in times.items() if name.startswith(mode)), default=None) for mode in MODES}
    ours = "  ".join(f"{mode} {time:.2f} ({align / time:.1f}x)" for mode, time in fastest.items() if time)
    shape = row["shape"]
    label = f"{shape['name']} sampling {shape['sampling']}"
    return f"{row['threads']} thread(s) {row['pass']:16s} {label:14s} roi_align {align:8.2f} ms  {ours}"


def main(arguments: list[str] | None = None, levels: list[Shape] = LEVELS) -> None:
    """Measures what the arguments say and writes the results."""
    parsed = measure.parse(measure.parser(__doc__ or "", "only 2 x 2 samples a bin", repeats=9), arguments)
    if parsed.check:
        print(goals.report(parsed.check))
        return
    measure.write(parsed.output, "deform_roi_pool", parsed.device, measure_time(parsed, levels))


if __name__ == "__main__":
    main()
