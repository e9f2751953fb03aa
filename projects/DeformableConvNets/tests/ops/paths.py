# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Which implementation computes a call: a path is a device, the samples that lead there, and how its results compare.

A test that holds for several operators and paths is written once and runs for a list of cases.
`tests/emulation` has one more path, the CUDA sources on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from .checks import TOLERANCE, assert_equals_reference
from .samples import (
    CONV_SAMPLES,
    GROUPED_SAMPLES,
    MODULATED_SAMPLES,
    PSROI_SAMPLES,
    ROI_SAMPLES,
    TILED_SAMPLES,
    Sample,
    on_a_grid,
    operands_of,
)

DEVICES = ["cpu", "cuda"]  # tests/ops/conftest.py marks what runs on "cuda" with `gpu`
FORMATS = NCHW, NHWC = [torch.contiguous_format, torch.channels_last]
FORMAT_NAMES = {NCHW: "NCHW", NHWC: "NHWC"}


@contextlib.contextmanager
def number_of_threads(count: int) -> Iterator[None]:
    """Sets the number of threads of the process, which other tests use too, and sets it back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_operands(operator: str, sample: Sample, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Operands as they come."""
    return operands_of(operator, sample, dtype, device)


def operands_of_groups(operator: str, sample: Sample, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Offsets on a grid, where the dtype has bits enough to hold them."""
    operands = operands_of(operator, sample, dtype, device)
    return on_a_grid(operands) if sample.spread and dtype != torch.bfloat16 else operands


def operands_of_tiles(operator: str, sample: Sample, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Offsets that bfloat16 holds exactly: odd multiples of 1/32. Results have about the size of the inputs."""
    operands = operands_of(operator, sample, torch.float32, device)
    operands["offset"] = on_a_grid(operands, 16)["offset"].clamp(-62.5 / 16, 63.5 / 16)
    if sample.spread > 10:
        operands["offset"] *= 8
    operands["weight"] /= operands["weight"][0].numel() ** 0.5
    return {name: t.to(dtype) for name, t in operands.items()}


@dataclass(frozen=True)
class Path:
    """One implementation: where it runs, which samples lead there, and how operands are made and results compared."""

    name: str
    device: str
    samples: dict[str, list[Any]]
    dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCE)
    formats: dict[str, list[torch.memory_format]] | None = None  # by operator, where there is more than one
    operands: Callable[[str, Any, torch.dtype, str], dict[str, Any]] = random_operands
    by_norm: bool = False


ALL_SAMPLES: dict[str, list[Any]] = {
    "deform_conv2d": CONV_SAMPLES,
    "modulated_deform_conv2d": MODULATED_SAMPLES,
    "deform_roi_pool": ROI_SAMPLES,
    "deform_psroi_pool": PSROI_SAMPLES,
}
BOTH_FORMATS = {"modulated_deform_conv2d": FORMATS}
CPU = Path("cpu", "cpu", ALL_SAMPLES, formats=BOTH_FORMATS)
CUDA = Path("cuda", "cuda", ALL_SAMPLES, formats=BOTH_FORMATS)
GROUPED = Path(
    "grouped",
    "cpu",
    {"deform_conv2d": GROUPED_SAMPLES},
    (torch.float64, torch.float32, torch.bfloat16),
    {"deform_conv2d": FORMATS},
    operands_of_groups,
)
# bfloat16 on the CPU, which has matrix tiles for it on some processors.
TILED = Path(
    "tiled",
    "cpu",
    {"deform_conv2d": TILED_SAMPLES},
    (torch.bfloat16,),
    {"deform_conv2d": FORMATS},
    operands_of_tiles,
    by_norm=True,
)
PATHS = [CPU, CUDA, GROUPED, TILED]


@dataclass(frozen=True)
class Case:
    """One call of one operator on one path."""

    operator: str
    path: Path
    sample: Any
    dtype: torch.dtype = torch.float64
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def device(self) -> str:
        return self.path.device

    def __str__(self) -> str:
        words = [self.operator, self.path.name, self.sample.name, str(self.dtype).removeprefix("torch.")]
        return "-".join([*words, FORMAT_NAMES[self.memory_format]])

    def operands(self) -> dict[str, Any]:
        return self.path.operands(self.operator, self.sample, self.dtype, self.device)

    def check(self) -> None:
        """Compares with the reference."""
        assert_equals_reference(
            self.operator,
            self.sample,
            self.operands(),
            memory_format=self.memory_format,
            by_norm=self.path.by_norm,
        )


def all_cases() -> list[Case]:
    """Every operator on every path, with every sample, dtype and memory format that the path is for."""
    return [
        Case(operator, path, sample, dtype, memory_format)
        for path in PATHS
        for operator, samples in path.samples.items()
        for memory_format in (path.formats or {}).get(operator, [NCHW])
        for dtype in path.dtypes
        for sample in samples
    ]


def parametrize_cases(cases: Iterable[Case], marks_of: Callable[[Case], list[Any]] = lambda case: []) -> Any:
    """Runs a test for each of the cases, some of which may have marks of their own."""
    return pytest.mark.parametrize("case", [pytest.param(case, marks=marks_of(case), id=str(case)) for case in cases])
