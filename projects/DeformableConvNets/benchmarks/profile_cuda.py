# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Where the time of deform_conv2d goes on a GPU: microseconds of every kernel that a call launches.

    python -m benchmarks.profile_cuda                    each kernel's time, written to results/profile_cuda.json
    ncu --profile-from-start off ... python -m benchmarks.profile_cuda --once
                                                         each call once, between the marks that ncu waits for

The layers are c3 to c5 as in benchmarks/deform_conv2d.py, modulated and channels_last. The plain convolution takes part
for comparison. With --once only c3 and c5 with 16 images are run, forward and backward.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run by the file's name, without -m

from benchmarks import command_line, layer, on_cuda
from benchmarks.measure import Calls
from benchmarks.results import Results
from benchmarks.rows import PASSES

BATCHES = (1, 2, 16)
WANTED = {"conv NHWC": "conv", "dcn_d2 NHWC": "dcn_d2"}


def calls(shape: layer.Shape, device: str, dtype: torch.dtype, direction: str) -> Calls:
    """The contestants that are profiled, ready to be called."""
    found = layer.Layer(shape, device, dtype).contestants(direction != "forward", peers=())
    return {short: found[name] for name, short in WANTED.items()}


def short_name(kernel: str) -> str:
    """A kernel's name without namespaces, return type and arguments, such as `product_kernel<SampleGather, 128>`."""
    name = kernel
    while (stripped := re.sub(r"\((?:[^()]|\(\))*\)", "", name)) != name:  # argument lists and casts
        name = stripped
    name = re.sub(r"(?:\w+::)+", "", name.removeprefix("void "))
    return name if len(name) <= 100 else f"{name[:97]}..."


def kernel_times(call: Callable[[], object], repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds a call and launches a call of every kernel, the longest first."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    sums: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            sums[short_name(event.name)].append(event.time_range.elapsed_us())
    found = {
        name: {"microseconds": round(sum(each) / repeats, 2), "launches": len(each) / repeats}
        for name, each in sums.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]["microseconds"]))


def describe(row: dict[str, Any]) -> str:
    """A line for the row; for the largest batch also one for each kernel."""
    shape, kernels = row["shape"], row["kernels"]
    total = sum(kernel["microseconds"] for kernel in kernels.values())
    lines = [f"{shape['name']} batch {shape['batch']} {row['pass']:16s} {row['contestant']:8s} {total:9.1f} us"]
    if shape["batch"] == max(BATCHES):
        lines += [f"    {k['microseconds']:9.1f} us  {k['launches']:4.1f} x  {name}" for name, k in kernels.items()]
    return "\n".join(lines)


def profile(arguments: Any, results: Results) -> None:
    """A row for every shape, pass and contestant."""
    dtype = on_cuda.set_precision(arguments.dtype)
    for batch in BATCHES:
        for stage in layer.STAGES:
            shape = replace(stage, batch=batch)
            for direction in PASSES:
                for name, call in calls(shape, arguments.device, dtype, direction).items():
                    row = {"shape": asdict(shape), "pass": direction, "dtype": arguments.dtype, "threads": 1}
                    row |= {"contestant": name, "kernels": kernel_times(call, arguments.repeats)}
                    results.add(row, {}, describe)


def run_once(arguments: Any) -> None:
    """Each call once between cudaProfilerStart and cudaProfilerStop."""
    dtype = on_cuda.set_precision(arguments.dtype)
    ready = [
        call
        for stage in (layer.STAGES[0], layer.STAGES[-1])
        for call in calls(replace(stage, batch=16), arguments.device, dtype, PASSES[1]).values()
    ]
    for call in ready:
        call(), call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in ready:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(arguments: list[str] | None = None) -> int:
    """Profiles what the arguments say; returns the exit status."""
    options = command_line.parser(__doc__ or "", "nothing", repeats=10)
    options.set_defaults(device="cuda", dtype="bfloat16")
    options.add_argument("--once", action="store_true", help="run each call once, for a profiler around this process")
    parsed = command_line.parse(options, arguments)
    if parsed.once:
        run_once(parsed)
        return 0
    results = Results(parsed.output, "profile", parsed.device)
    profile(parsed, results)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
