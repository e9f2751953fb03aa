# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The price of deformability: deform_conv2d against a plain convolution of the same shape, and against its peers.

    python -m benchmarks.deform_conv2d                       the CPU, 1 thread and all threads
    python -m benchmarks.deform_conv2d --device cuda         the GPU; --dtype tf32, --buffers hot rotated
    python -m benchmarks.deform_conv2d --quick               one row a stage, forward and forward+backward
    python -m benchmarks.deform_conv2d --memory              peak extra memory; not of OpenVINO, which keeps its memory
    python -m benchmarks.deform_conv2d --peers none          without other implementations
    python -m benchmarks.deform_conv2d --check FILE...       which goals hold

Shapes are those of a ResNet-50's stages at 800 x 1216. All contestants are timed alternately in one process; the table
shows medians, and the file under results/ has their spread. A price is the time over that of the plain convolution in
its faster memory format. On the GPU a call takes the same operands as the call before (hot) or others that are in no
cache (rotated). More contestants take part there: the deterministic mode, torchvision's operator under autocast, and
the two ways from an offset branch's output to the operator, as it is ("branch") and by a split and a sigmoid ("split
branch").

Before a shape is timed all implementations run once and are compared with torchvision in float32. One that raises or
computes something else drops out, and the row says why. If it is one of ours the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run by the file's name, without -m

from benchmarks import command_line, failures, measure, on_cuda, rows
from benchmarks.failures import Failures, attempt
from benchmarks.layer import STAGES, Layer, Shape, as_tensors, shapes
from benchmarks.measure import Calls
from benchmarks.peers import CONVOLUTION_PEERS
from benchmarks.results import Results

# How far values may differ from a computation in float32, relative to the largest value.
TOLERANCES = {"float32": 1e-4, "tf32": 5e-3, "float16": 5e-3, "bfloat16": 2e-2}


def check_equal(
    layer: Layer,
    tolerance: float,
    failed: Failures,
    backward: bool,
    peers: Collection[str] = CONVOLUTION_PEERS,
    seconds: float = 0,
) -> None:
    """Notes in `failed` who raises or does not compute what torchvision computes in float32.

    Torchvision itself is not compared with itself, and plain convolutions compute something else. A peer may take
    `seconds`, if these are given.
    """
    expected = attempt(failed, "reference", layer.reference, backward)
    calls = layer.contestants(backward, peers, failed)
    for name, call in calls.items():
        if failures.dropped(failed, name) or name.startswith("conv "):
            continue
        actual = attempt(failed, name, call, seconds=seconds if failures.is_peer(name) else 0)
        if actual is not None and expected and name != "torchvision":
            reason = attempt(failed, name, _difference, as_tensors(actual), expected, tolerance, "branch" in name)
            if reason:
                failures.note(failed, name, reason)


def _difference(actual: list[Tensor], expected: list[Tensor], tolerance: float, branch: bool) -> str:
    """Says what differs by more than the tolerance; gradients of a branch's outputs are not compared."""
    names = ["input's gradient", "weight's gradient", "offset's gradient", "mask's gradient"]
    names = (names[:2] if branch else names[: len(expected)]) if len(expected) > 1 else ["output"]
    for name, a, e in zip(names, actual, expected):
        distance, size = (a.to(e.device).float() - e).abs(), e.abs()
        # Some samples lie exactly on the border of the area that contributes. There torchvision takes another one-sided
        # derivative by the offset than we do. These samples are few, but in 16 bits they exist.
        error = float(distance.mean() / size.mean() if name == "offset's gradient" else distance.max() / size.max())
        if not error <= tolerance:
            return f"its {name} differs from torchvision's in float32 by {error:.3g} (relative)"
    return ""


class Convolution:
    """A layer with the options of a run, for `measure.time_cases`."""

    def __init__(self, shape: Shape, arguments: argparse.Namespace, dtype: torch.dtype) -> None:
        self.layer = Layer(shape, arguments.device, dtype)
        self.arguments = arguments

    def check(self, backward: bool, failed: Failures) -> None:
        """Compares all contestants with torchvision in float32."""
        tolerance = TOLERANCES[self.arguments.dtype]
        seconds = self.arguments.peer_seconds if self.arguments.device == "cuda" else 0
        check_equal(self.layer, tolerance, failed, backward, self.arguments.peers, seconds)

    def calls(self, backward: bool, buffers: str, failed: Failures) -> Calls:
        """All contestants."""
        peers = self.arguments.peers
        if buffers != "rotated":
            return self.layer.contestants(backward, peers, failed)
        copies = on_cuda.copies_needed(sum(tensor.nbytes for tensor in self.layer.tensors().values()))
        layers = [self.layer.in_other_memory() for _ in range(copies)]
        return on_cuda.rotating([layer.contestants(backward, peers, failed) for layer in layers])


def measure_time(arguments: argparse.Namespace, stages: list[Shape], results: Results) -> None:
    """Times every shape, pass and number of threads; a row and a line for each."""
    dtype = on_cuda.set_precision(arguments.dtype)
    cases = [
        (asdict(shape), partial(Convolution, shape, arguments, dtype))
        for shape in shapes(arguments.device, arguments.quick, stages)
    ]
    measure.time_cases(cases, arguments, results, describe, arguments.buffers)


def describe(row: dict[str, Any]) -> str:
    """One line: the shape's differences from the default, the price, and the factor over each peer."""
    shape = row["shape"]
    varied = [f"{k}={v}" for k, v in shape.items() if k in ("batch", "stride", "groups", "deform_groups") and v != 1]
    varied += [] if shape["mask"] else ["no mask"]
    times = {name: timing["median"] for name, timing in row["milliseconds"].items()}
    conv, ours = (rows.fastest(row, name) for name in ("conv", "dcn_d2"))
    names = ("torchvision", "autocast torchvision", "deformops NHWC", "onnxruntime", "openvino")
    peers = ", ".join(f"{rows.quotient(times[n], ours)}x {n}" for n in names if n in times)
    label = " ".join([shape["name"], *varied])
    where = f"{row['dtype']} {row['buffers']}" if "buffers" in row else f"{row['threads']} thread(s)"
    return (
        f"{where} {row['pass']:16s} {label:24s} conv {rows.duration(conv):>8s}  "
        f"dcn_d2 {rows.duration(ours):>8s}  price {rows.quotient(ours, conv):>5s}  speed: {peers or '-'}"
    )


def measure_memory(arguments: argparse.Namespace, stages: list[Shape], results: Results) -> None:
    """Measures the peak extra memory of every contestant; a row and a line for each shape and pass.

    On a CPU it is measured with one thread. On CUDA a row also has "copies": what a channels_last copy of the input
    takes and, for a backward pass, one of its gradient.
    """
    cuda = arguments.device == "cuda"
    torch.set_num_threads(1)
    dtype = on_cuda.set_precision(arguments.dtype) if cuda else torch.float32
    too_slow: Failures = {}
    for shape in shapes(arguments.device, arguments.quick, stages):
        for direction in rows.PASSES:
            failed = dict(too_slow)
            extra: dict[str, float] = {}
            layer = attempt(failed, "operands", Layer, shape, arguments.device, dtype)
            parts = (direction != "forward", arguments.peers, failed)
            calls = attempt(failed, "operands", layer.contestants, *parts) if layer else None
            for name, call in (calls or {}).items():
                if not failures.dropped(failed, name):
                    seconds = arguments.peer_seconds if cuda and failures.is_peer(name) else 0
                    extra[name] = attempt(failed, name, measure.peak_extra_mib, call, arguments.device, seconds=seconds)
            extra = {name: mib for name, mib in extra.items() if mib is not None}
            if cuda and layer:
                extra["copies"] = round(layer.input.nbytes * (1 if direction == "forward" else 2) / 2**20, 2)
            row = {"shape": asdict(shape), "pass": direction, "threads": 1}
            row |= {"dtype": arguments.dtype if cuda else "float32", "peak_extra_mib": extra}
            results.add(row, failed, lambda row: f"{row['pass']} {row['shape']['name']} {row['peak_extra_mib']}")
            too_slow = failures.too_slow(failed)


def main(arguments: list[str] | None = None, stages: list[Shape] = STAGES) -> int:
    """Measures what the arguments say and writes the results; returns the exit status."""
    options = command_line.parser(__doc__ or "", "only the three plain stage shapes", repeats=9)
    options.add_argument("--memory", action="store_true", help="measure peak extra memory instead of time")
    options.add_argument("--buffers", nargs="+", choices=rows.BUFFERS, default=["hot"], help="CUDA only")
    choices = ("all", "none", *CONVOLUTION_PEERS)
    options.add_argument("--peers", nargs="+", choices=choices, default=["all"], help="other implementations to time")
    options.add_argument(
        "--peer-seconds",
        type=float,
        default=20,
        help="on CUDA, how long a peer's first call may take, compilers included; default: %(default)s",
    )
    parsed = command_line.parse(options, arguments)
    if parsed.device == "cpu" and parsed.buffers != ["hot"]:
        options.error("--buffers rotated: only for --device cuda")
    if len(parsed.peers) > 1 and {"all", "none"} & {*parsed.peers}:
        options.error("--peers: all or none or some names")
    parsed.peers = {"all": CONVOLUTION_PEERS, "none": ()}.get(parsed.peers[0], parsed.peers)
    if parsed.memory:  # OpenVINO allocates when it compiles a model: a call takes nothing more
        parsed.peers = [name for name in parsed.peers if name != "openvino"]
    if parsed.memory and parsed.device == "cpu" and os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        return subprocess.run([sys.executable, *sys.orig_argv[1:]], env=environment, check=False).returncode
    results = Results(parsed.output, f"deform_conv2d{'_memory' if parsed.memory else ''}", parsed.device)
    (measure_memory if parsed.memory else measure_time)(parsed, stages, results)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
