# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A contestant that raises or computes something else costs only itself: it drops out of its row, which says why."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from benchmarks.peers import PEERS

# Why contestants dropped out, by their name. The name of a peer alone means all its contestants.
Failures = dict[str, str]


def dropped(failed: Failures, name: str) -> bool:
    """Whether a contestant has dropped out."""
    return name in failed or name.split()[0] in failed


def is_peer(name: str) -> bool:
    """Whether a contestant is another implementation: neither ours nor a plain convolution."""
    return name.split()[0] in PEERS


def too_slow(failed: Failures) -> Failures:
    """Those peers in `failed` that ran out of time."""
    return {name: reason for name, reason in failed.items() if name in PEERS and reason.startswith("TimeoutError")}


def note(failed: Failures, name: str, reason: str) -> None:
    """Writes down why a contestant drops out, and prints it."""
    failed[name] = reason
    _print_once(f"{name} drops out: {reason}")


@cache
def _print_once(line: str) -> None:
    print(line, flush=True)


def attempt(failed: Failures, name: str, function: Callable[..., Any], *arguments: Any, seconds: float = 0) -> Any:
    """Returns what the function returns, or None if it raises: then the contestant `name` drops out.

    Waits for the GPU, so that a kernel's error is noted where it arises. If `seconds` are given and the call takes
    longer, all contestants of the same peer drop out.
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
    """Raises TimeoutError in a body that runs longer, as soon as the main thread is back in Python."""

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
