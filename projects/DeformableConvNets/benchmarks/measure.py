# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What calls cost: times of contestants that run alternately, and peak memory."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.failures import Failures, attempt, dropped, too_slow
from benchmarks.results import Results
from benchmarks.rows import PASSES

MOST_SECONDS = 4.0
SLEEP_CYCLES = 3_000_000  # a millisecond or more of any GPU
SLEEPS = (1.0, 20.0)  # the shortest and the longest sleep before a call, in milliseconds

Calls = dict[str, Callable[[], object]]  # contestants, ready to be called, by their names


@dataclass
class Timing:
    """Milliseconds of one contestant: median, the quarter marks as its spread, and how often it was timed."""

    median: float
    low: float
    high: float
    repeats: int


class Case(Protocol):
    """The operands of one shape, whose contestants `time_cases` times."""

    def check(self, backward: bool, failed: Failures) -> None:
        """Notes in `failed` who does not compute what it should."""

    def calls(self, backward: bool, buffers: str, failed: Failures) -> Calls:
        """The contestants with operands that are "hot" or "rotated"; notes in `failed` who cannot be made ready."""


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


def time_cases(
    cases: Iterable[tuple[dict[str, Any], Callable[[], Case]]],
    arguments: argparse.Namespace,
    results: Results,
    describe: Callable[[dict[str, Any]], str],
    buffers: Sequence[str] = ("",),
) -> None:
    """Times every case, pass and number of threads; adds a row for each.

    Args:
        cases: what a row says of its shape, and what makes the case. If it cannot be made, its rows have no times.
        arguments: the device, dtype, threads and repeats.
        results: where the rows go.
        describe: one line for a row.
        buffers: states of a GPU's caches, each with rows of its own; rows on a CPU do not name them.
    """
    cases = list(cases)
    on_gpu = arguments.device == "cuda"
    late: Failures = {}  # peers that had no time left are not tried again
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape, make in cases:
            wrong = dict(late)
            case = attempt(wrong, "operands", make)
            for direction in PASSES:
                backward = direction != "forward"
                if case:
                    attempt(wrong, "operands", case.check, backward, wrong)
                for state in buffers:
                    row = {"shape": shape, "pass": direction, "dtype": arguments.dtype, "threads": threads}
                    row |= ({"buffers": state} if on_gpu and state else {}) | {"milliseconds": {}}
                    failed = dict(wrong)
                    calls = attempt(failed, "operands", case.calls, backward, state, failed) if case else None
                    if calls:
                        hot = row.get("buffers") == "hot"
                        row |= interleave(calls, arguments.device, arguments.repeats, failed, ahead=on_gpu, hot=hot)
                    results.add(row, failed, describe)
            late = too_slow(wrong)


def interleave(
    contestants: Calls,
    device: str,
    repeats: int,
    failed: Failures,
    most_seconds: float = MOST_SECONDS,
    ahead: bool = False,
    hot: bool = False,
    clock: Callable[[], float] | None = None,
    parts: int = 1,
) -> dict[str, dict[str, Any]]:
    """Times all contestants alternately, so that a busy moment of the machine hits all of them alike.

    On a CPU with one thread this measures the thread's CPU time, which other processes disturb little; with more
    threads the wall time; on CUDA the time between two events. A contestant that has taken `most_seconds` is not timed
    again once it has been timed three times.

    Args:
        contestants: what is timed.
        device: "cpu" or "cuda".
        repeats: how often each is timed.
        failed: who has dropped out before; whoever raises here is added.
        most_seconds: after how much time a contestant is not timed again.
        ahead: the GPU sleeps until all of a call's kernels are queued. Then the time is that of their work, and not of
            how fast Python launches them; that is "issue_milliseconds".
        hot: a call that is not timed goes before each that is. Without it, the other contestants have filled the
            caches with their own operands in between.
        clock: measures seconds on a CPU, for contestants with threads of their own.
        parts: how many equal parts a call has; times are those of one part.

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
                sample = attempt(failed, name, _milliseconds, contestants[name], device, sleeps[name], hot, clock)
                if sample is None:
                    del samples[name]
                else:
                    times.append(sample)
    found: dict[str, dict[str, Any]] = {key: {} for key in ("milliseconds", *(["issue_milliseconds"] if ahead else []))}
    for name, times in samples.items():
        milliseconds, issues = zip(*times)
        found["milliseconds"][name] = asdict(_summary([sample / parts for sample in milliseconds]))
        if ahead:
            found["issue_milliseconds"][name] = round(statistics.median(issues), 4)
    return found


def _warm_up(call: Callable[[], object], device: str) -> float:
    """Fills memory and caches, and lets algorithms be chosen; returns the milliseconds to issue the last call."""
    for _ in range(2 if device == "cuda" else 0):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def _milliseconds(
    call: Callable[[], object], device: str, sleep: float, hot: bool, clock: Callable[[], float] | None
) -> tuple[float, float]:
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
    clock = clock or (time.thread_time if torch.get_num_threads() == 1 else time.perf_counter)
    begin = clock()
    call()
    milliseconds = (clock() - begin) * 1e3
    return milliseconds, milliseconds


def _summary(values: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(round(median, 4), round(low, 4), round(high, 4), len(values))


def peak_extra_mib(call: Callable[[], object], device: str) -> float:
    """Mebibytes that `call` takes at most, on top of what is there before it and of what it returns.

    On CUDA it is what torch allocates. On a CPU (Linux only) it is the resident memory of this process. Run it there
    with MALLOC_MMAP_THRESHOLD_=65536 in the environment: freed memory then goes back to the system at once, and what an
    earlier call left behind is not counted as free.
    """
    call()  # workspaces that are kept from call to call
    before = _begin_peak(device)
    result = call()
    peak = _end_peak(device)
    results = result if isinstance(result, (tuple, list)) else [result]
    return round(max(peak - before - sum(map(_bytes_of, results)), 0) / 2**20, 2)


def _begin_peak(device: str) -> int:
    """Forgets earlier peaks; returns the bytes that are in use now."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _end_peak(device: str) -> int:
    """The most bytes that were in use since `_begin_peak`."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def _bytes_of(result: Any) -> int:
    """Bytes of a tensor or of one of ONNX Runtime's arrays; anything else counts as none."""
    return result.untyped_storage().nbytes() if isinstance(result, Tensor) else getattr(result, "nbytes", 0)
