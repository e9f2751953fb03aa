# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the benchmarks do on a GPU only: TF32, operands that are in no cache, autocast, the deterministic mode."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.measure import Calls

# More than twice the L2 cache of any GPU: what was used before the last copy is in no cache.
CACHE_BYTES = 256 << 20
MOST_COPIES = 16


def set_precision(dtype: str, tune: bool = True) -> torch.dtype:
    """Lets matrix products and convolutions round to TF32 if that is the dtype; returns torch's dtype.

    With `tune` cuDNN tries its algorithms, so that the plain convolution is as fast as it can be. None of it changes
    anything on a CPU.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    torch.backends.cudnn.benchmark = tune
    return torch.float32 if dtype == "tf32" else getattr(torch, dtype)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, matrix products do not round to TF32, whatever precision is set outside."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def copies_needed(bytes_of_one: int) -> int:
    """How many sets of operands to use alternately, so that each has left the caches when it is used again."""
    return min(max(2, math.ceil(CACHE_BYTES / max(bytes_of_one, 1))), MOST_COPIES)


def rotating(sets: Sequence[Calls]) -> Calls:
    """Contestants that take another set of operands at each call."""

    def rotate(name: str) -> Callable[[], object]:
        calls = itertools.cycle([contestants[name] for contestants in sets])
        return lambda: next(calls)()

    return {name: rotate(name) for name in sets[0] if all(name in contestants for contestants in sets)}


def deterministic(call: Callable[[], object]) -> Callable[[], object]:
    """The call under `torch.use_deterministic_algorithms`, but without filling new memory, which that would add."""

    def wrapped() -> object:
        settings: Any = torch.utils.deterministic  # its attribute is made at run time
        filling, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
        torch.use_deterministic_algorithms(True)
        try:
            return call()
        finally:
            torch.use_deterministic_algorithms(False)
            settings.fill_uninitialized_memory = filling

    return wrapped


def has_deterministic_mode(call: Callable[[], object]) -> bool:
    """Whether an operator accepts `torch.use_deterministic_algorithms`; other errors are raised."""
    try:
        deterministic(call)()
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        return False
    return True


def under_autocast(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """The function under autocast. Its backward pass runs outside, as in training with mixed precision."""

    def wrapped(*operands: Any) -> Any:
        with torch.autocast("cuda", dtype):
            return function(*operands)

    return wrapped
