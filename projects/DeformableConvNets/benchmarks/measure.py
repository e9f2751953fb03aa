# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: options, interleaved timing, peak memory, a result file that says where it comes from.

A contestant that raises or computes something else costs only itself: it drops out of its row, which says why.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcn_d2.quiet import silence_detectron2_warnings

silence_detectron2_warnings()  # here, because benchmarks import this file before Detectron2

MOST_SECONDS = 4.0
SLEEP_CYCLES = 3_000_000  # a millisecond or more of any GPU
SLEEPS = (1.0, 20.0)  # the shortest and the longest sleep before a call, in milliseconds
LAST = torch.channels_last
RESULTS = Path(__file__).resolve().parent.parent / "results"
# The first words of contestants that are not ours.
PEERS = ("torchvision", "autocast", "deformops", "onnxruntime", "roi_align")

# Why contestants dropped out, by their name; that of a peer alone stands for all its contestants.
Failures = dict[str, str]


def dropped(failed: Failures, name: str) -> bool:
    """Whether a contestant has dropped out."""
    return name in failed or name.split()[0] in failed


def is_peer(name: str) -> bool:
    """Whether a contestant is not ours, nor a plain convolution."""
    return name.split()[0] in PEERS


def too_slow(failed: Failures) -> Failures:
    """Those peers of `failed` that had no more time."""
    return {name: reason for name, reason in failed.items() if name in PEERS and reason.startswith("TimeoutError")}


def note(failed: Failures, name: str, reason: str) -> None:
    """Writes down why a contestant drops out, and prints it."""
    failed[name] = reason
    _print_once(f"{name} drops out: {reason}")


@cache
def _print_once(line: str) -> None:
    print(line, flush=True)


def attempt(failed: Failures, name: str, function: Callable[..., Any], *arguments: Any, seconds: float = 0) -> Any:
    """Returns what the function returns, or None where it raises: then the contestant `name` drops out.

    Waits for the GPU, so that a kernel's error is noted where it arises. One that takes longer than `seconds`, if these
    are given, drops out with all contestants of the same peer.
    """
    try:
        with _time_limit(seconds):
            result = function(*arguments)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        return result
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        late = seconds and isinstance(error, TimeoutError)
        note(failed, name.split()[0] if late else name, f"{type(error).__name__}: {first_line}")
        return None


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what runs longer, as soon as it comes back to Python in the main thread."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    if not seconds:
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
    failed: Failures,
    most_seconds: float = MOST_SECONDS,
    ahead: bool = False,
    hot: bool = False,
) -> dict[str, dict[str, Any]]:
    """Times all contestants in turns, so that a busy moment of the machine hits all of them alike.

    On CPU with one thread it is the thread's CPU time, which other processes disturb little; with more threads the wall
    time; on CUDA the time between two events. A contestant that has taken `most_seconds` drops out once it has been
    timed three times. With `ahead` the GPU sleeps until all of a call's kernels are queued, so that what is timed is
    their work and not how fast Python launches them; that is "issue_milliseconds". With `hot` a call that is not timed
    goes before each that is: in between, the other contestants have filled the caches with what is theirs.

    Returns:
        What a row says about those that have not failed: "milliseconds", and with `ahead` "issue_milliseconds".
    """
    samples: dict[str, list[tuple[float, float]]] = {}
    sleeps = {}
    for name, call in contestants.items():
        issue = None if dropped(failed, name) else attempt(failed, name, _warm_up, call, device)
        if issue is not None:
            samples[name] = []
            sleeps[name] = min(max(1.5 * issue, SLEEPS[0]), SLEEPS[1]) if ahead else 0.0
    for _ in range(repeats):
        for name, times in list(samples.items()):
            if len(times) < 3 or sum(sample[0] for sample in times) < most_seconds * 1e3:
                sample = attempt(failed, name, _milliseconds, contestants[name], device, sleeps[name], hot)
                if sample is None:
                    del samples[name]
                else:
                    times.append(sample)
    found: dict[str, dict[str, Any]] = {"milliseconds": {}} | ({"issue_milliseconds": {}} if ahead else {})
    for name, times in samples.items():
        milliseconds, issues = zip(*times)
        found["milliseconds"][name] = asdict(_summary(milliseconds))
        if ahead:
            found["issue_milliseconds"][name] = round(statistics.median(issues), 4)
    return found


def _warm_up(call: Callable[[], object], device: str) -> float:
    """Fills memory and caches, lets algorithms be chosen; returns the milliseconds in which a call was issued last."""
    for _ in range(2 if device == "cuda" else 0):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def _milliseconds(call: Callable[[], object], device: str, sleep: float, hot: bool) -> tuple[float, float]:
    """How long a call takes, and how long the host takes to issue it; the GPU sleeps before it."""
    if hot:
        call()
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if sleep:
            torch.cuda._sleep(round(sleep * SLEEP_CYCLES))
        start.record()
        begin = time.perf_counter()
        call()
        issue = (time.perf_counter() - begin) * 1e3
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), issue
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    call()
    milliseconds = (clock() - begin) * 1e3
    return milliseconds, milliseconds


def _summary(values: Sequence[float]) -> Timing:
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
    for name in ("torch", "torchvision", "onnxruntime", "deformops", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    name, changes = commit()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        **({"gpu": gpu()} if device == "cuda" else {}),
        "threads_available": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_set_cap": os.environ.get("DCN_CPU_CAPABILITY", "none"),
        "versions": versions,
        "python": platform.python_version(),
        "commit": name,
        "uncommitted_changes": changes,
        "date": time.strftime("%Y-%m-%d"),
    }


def gpu() -> dict[str, Any]:
    """How large the GPU is, and the versions of what drives it; what cannot be found out is left out."""
    questions: dict[str, Callable[[], Any]] = {
        "capability": lambda: "{}.{}".format(*torch.cuda.get_device_capability()),
        "multiprocessors": lambda: torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count,
        "cuda": lambda: torch.version.cuda,
        "cudnn": torch.backends.cudnn.version,
        "driver": lambda: _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0],
    }
    found = {}
    for name, ask in questions.items():
        with suppress(Exception):
            found[name] = ask()
    return found


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


@cache
def commit() -> tuple[str, bool | None]:
    """The commit, and whether files differ from it: None if nobody knows.

    The environment variable DCN_COMMIT says it where there is no git, as "abc123def456" or "abc123def456 with changes".
    """
    named, changed, _ = os.environ.get("DCN_COMMIT", "").partition(" with changes")
    if named:
        return named, bool(changed)
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return head or "unknown", None if changes is None else bool(changes)


def _output(*command: str) -> str | None:
    """What a command prints, or None if there is no such command or it fails."""
    project = Path(__file__).resolve().parent.parent
    try:
        result = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


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


class Results:
    """The rows of a benchmark, and their file: it is written again after every row, so that none is lost.

    Args:
        path: the file, by default one below results/.
        benchmark: the benchmark's name.
        device: "cpu" or "cuda".
    """

    def __init__(self, path: Path | None, benchmark: str, device: str) -> None:
        self.path = path or RESULTS / f"{benchmark}_{device}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        self._head = {"benchmark": benchmark, "device": device, "environment": environment(device)}

    def add(self, row: dict[str, Any], failed: Failures, describe: Callable[[dict[str, Any]], str]) -> None:
        """Writes the row, with those that dropped out of it, and prints a line."""
        self.rows.append(row | ({"failed": failed} if failed else {}))
        self._write(complete=False)
        print(describe(row) + (f"  failed: {', '.join(failed)}" if failed else ""), flush=True)

    def finish(self) -> int:
        """Says that no row is missing; returns the exit status, 1 if anything failed that is not a peer."""
        self._write(complete=True)
        print(f"written: {self.path}")
        return int(any(not is_peer(name) for row in self.rows for name in row.get("failed", ())))

    def _write(self, complete: bool) -> None:
        text = json.dumps(self._head | {"complete": complete, "rows": self.rows}, indent=1)
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(f"{text}\n")
        os.replace(part, self.path)


def write(path: Path | None, benchmark: str, device: str, rows: list[dict[str, Any]]) -> None:
    """Writes all rows of a benchmark at once."""
    results = Results(path, benchmark, device)
    results.rows = rows
    results.finish()


def fastest(row: dict[str, Any], name: str) -> float | None:
    """The median of the contestants with this first word, in the faster memory format; None if none took part."""
    times = [timing["median"] for contestant, timing in row["milliseconds"].items() if contestant.split()[0] == name]
    return min(times, default=None)


def duration(milliseconds: float | None) -> str:
    """A time in words, with three significant digits."""
    if milliseconds is None:
        return "-"
    value, unit = (milliseconds, "ms") if milliseconds >= 1 else (milliseconds * 1e3, "us")
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def quotient(numerator: float | None, denominator: float | None, digits: int = 2) -> str:
    """The quotient of two times in words."""
    return f"{numerator / denominator:.{digits}f}" if numerator and denominator else "-"
