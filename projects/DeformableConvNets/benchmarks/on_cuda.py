# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the benchmarks do on a GPU only: TF32, operands that are in no cache, peers, memory, the deterministic mode."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

# More than the L2 caches of all GPUs that are sold, twice: what was used before the last copy is in no cache.
CACHE_BYTES = 256 << 20
MOST_COPIES = 16
BUFFERS = ("hot", "rotated")

Calls = dict[str, Callable[[], object]]


def set_precision(dtype: str, tune: bool = True) -> torch.dtype:
    """Lets matrix products and convolutions round to TF32 if that is the dtype; returns torch's dtype.

    With `tune` cuDNN tries its algorithms: the plain convolution shall be as fast as it can.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    torch.backends.cudnn.benchmark = tune
    return torch.float32 if dtype == "tf32" else getattr(torch, dtype)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Matrix products do not round to TF32 inside, whatever the precision is set to."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def copies_needed(bytes_of_one: int) -> int:
    """How many sets of operands to use in turns, so that each has left the caches when it is used again."""
    return min(max(2, math.ceil(CACHE_BYTES / max(bytes_of_one, 1))), MOST_COPIES)


def rotating(sets: Sequence[Calls]) -> Calls:
    """Contestants that take another set of operands at each call."""

    def rotate(name: str) -> Callable[[], object]:
        calls = itertools.cycle([contestants[name] for contestants in sets])
        return lambda: next(calls)()

    return {name: rotate(name) for name in sets[0] if all(name in contestants for contestants in sets)}


def deterministic(call: Callable[[], object]) -> Callable[[], object]:
    """The call under `torch.use_deterministic_algorithms`, without the filling of new memory that it brings."""

    def wrapped() -> object:
        filling = torch.utils.deterministic.fill_uninitialized_memory
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
        try:
            return call()
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = filling

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
    """The function as a model that trains with mixed precision calls it; its backward pass runs without, as there."""

    def wrapped(*operands: Any) -> Any:
        with torch.autocast("cuda", dtype):
            return function(*operands)

    return wrapped


@cache
def deformops() -> Callable[..., Any] | None:
    """The package deformops' operator with torchvision's arguments, or None, with a reason, where it cannot be had.

    On a GPU it runs its Triton kernels, unless told otherwise: it needs a C compiler for Triton, but neither nvcc nor
    the network. The first call for a shape and dtype tries 24 kernels forward and 16 backward, each of which takes
    about 10 s to compile.
    """
    try:
        from deformops.integrations.torchvision import deform_conv2d
    except Exception as error:  # its syntax is too new for an older Python, and it may not fit this torch
        print(f"deformops takes no part: {type(error).__name__}: {error}", flush=True)
        return None

    def call(x: Any, offset: Any, weight: Any, bias: Any, stride: int, padding: int, dilation: int, mask: Any) -> Any:
        pairs = [(number, number) for number in (stride, padding, dilation)]
        return deform_conv2d(x, offset, weight, bias, *pairs, mask)

    return call


def peak_extra_mib(call: Callable[[], object]) -> float:
    """Mebibytes that torch allocates at most while `call` runs, without those of what it returns."""
    call()  # workspaces that are kept from call to call
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    results = result if isinstance(result, (tuple, list)) else [result]
    returned = sum(tensor.untyped_storage().nbytes() for tensor in results if isinstance(tensor, torch.Tensor))
    return round(max(torch.cuda.max_memory_allocated() - before - returned, 0) / 2**20, 2)
