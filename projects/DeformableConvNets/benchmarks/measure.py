# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: options, interleaved timing, peak memory, a result file that says where it comes from."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcn_d2.quiet import silence_detectron2_warnings

silence_detectron2_warnings()  # here, because benchmarks import this file before Detectron2

MOST_SECONDS = 4.0
SLEEP_CYCLES = 2_000_000  # about a millisecond
LAST = torch.channels_last
RESULTS = Path(__file__).resolve().parent.parent / "results"


@dataclass
class Timing:
    """Milliseconds of one contestant: median, the quarter marks as its spread, and how often it was timed."""

    median: float
    low: float
    high: float
    repeats: int


def prepare(
    function: Callable[..., Tensor], operands: tuple[Tensor, ...], grad: Tensor, backward: bool
) -> Callable[[], object]:
    """Returns a call of `function(*operands)`: without gradients, or with those of all operands for `grad`."""
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*operands)

        return forward
    leaves = [t.detach().requires_grad_() for t in operands]
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def interleave(
    contestants: dict[str, Callable[[], object]],
    device: str,
    repeats: int,
    most_seconds: float = MOST_SECONDS,
    ahead: bool = False,
) -> dict[str, Timing]:
    """Times all contestants in turns, so that a busy moment of the machine hits all of them alike.

    On CPU with one thread it is the thread's CPU time, which other processes disturb little; with more threads the wall
    time; on CUDA the time between two events. A contestant that has taken `most_seconds` drops out once it has been
    timed three times. With `ahead` the GPU sleeps until all of a call's kernels are queued, so that what is timed is
    their work and not how fast Python launches them.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():  # warm-up: memory, caches, algorithm choices
        for _ in range(3 if device == "cuda" else 1):
            call()
    for _ in range(repeats):
        for name, call in contestants.items():
            if len(samples[name]) < 3 or sum(samples[name]) < most_seconds * 1e3:
                samples[name].append(_milliseconds(call, device, ahead))
    return {name: _summary(values) for name, values in samples.items()}


def _milliseconds(call: Callable[[], object], device: str, ahead: bool = False) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    call()
    return (clock() - begin) * 1e3


def _summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(round(median, 4), round(low, 4), round(high, 4), len(values))


def peak_extra_mib(call: Callable[[], object]) -> float:
    """Mebibytes by which the resident memory of this process rises at most while `call` runs (Linux only).

    What `call` returns does not count: it is memory on top of inputs and outputs. Run it with
    MALLOC_MMAP_THRESHOLD_=65536 in the environment: freed memory then goes back to the system at once, and what an
    earlier call left behind is not counted as free.
    """
    call()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    results = result if isinstance(result, (tuple, list)) else [result]
    returned = sum(r.nbytes for r in results if hasattr(r, "nbytes"))  # tensors, and ONNX Runtime's arrays
    return round(max((peak - before) / 1024 - returned / 2**20, 0.0), 2)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def environment(device: str) -> dict[str, Any]:
    """Where and on what the numbers were measured."""
    versions = {}
    for name in ("torch", "torchvision", "onnxruntime"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads_available": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_set_cap": os.environ.get("DCN_CPU_CAPABILITY", "none"),
        "versions": versions,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")),
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The processor's name, and which vector extensions it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split("\t", 1) for line in reversed(lines) if "\t" in line)
    name = fields.get("model name", platform.machine()).lstrip("\t: ")
    flags = set(fields.get("flags", "").split())
    return f"{name} ({', '.join(f for f in ('avx2', 'avx512f', 'amx_bf16') if f in flags) or 'no AVX2'})"


def _git(*arguments: str) -> str:
    project = Path(__file__).resolve().parent.parent
    result = subprocess.run(["git", *arguments], cwd=project, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def parser(description: str, quick: str, repeats: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have; `quick` says what --quick leaves out."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--dtype", default="float32", choices=["float32", "tf32", "float16", "bfloat16"])
    options.add_argument("--threads", type=int, nargs="+", help="default: 1 and all, or 1 for CUDA")
    options.add_argument("--repeats", type=int, default=repeats)
    options.add_argument("--quick", action="store_true", help=quick)
    options.add_argument("--output", type=Path, help="default: results/<benchmark>_<device>.json")
    options.add_argument("--check", type=Path, nargs="+", metavar="FILE", help="say which goals result files meet")
    return options


def parse(options: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parses, and sets what depends on the machine."""
    parsed = options.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda: no GPU is visible to torch")
    if parsed.dtype == "tf32" and parsed.device != "cuda":
        options.error("--dtype tf32: only GPUs have it, --device cuda")
    if parsed.repeats < 2:
        options.error(f"--repeats: a spread needs at least 2, got {parsed.repeats}")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parsed.threads = parsed.threads or (sorted({1, available}) if parsed.device == "cpu" else [1])
    return parsed


def write(path: Path | None, benchmark: str, device: str, rows: list[dict[str, Any]]) -> None:
    """Writes rows with their environment as JSON; without a path below results/."""
    path = path or RESULTS / f"{benchmark}_{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": benchmark, "device": device, "environment": environment(device), "rows": rows}
    path.write_text(json.dumps(document, indent=1, default=asdict) + "\n")
    print(f"written: {path}")
