# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Any number of threads gives the right values, and the same bits from run to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .checks import assert_same_bits, compiled, results
from .paths import CPU, CUDA, GROUPED, TILED, Case, number_of_threads, parametrize_cases
from .samples import CONVOLUTIONS, POOLINGS, ConvSample, RoiSample, grouped

THREADS = [1, 2, 5]
MANY = ConvSample("many_channels", batch=2, channels=48, deform_groups=2, size=(11, 13))
SHARED = [
    *(Case(operator, CPU, MANY) for operator in CONVOLUTIONS),
    *(Case(operator, CPU, RoiSample("many_channels", channels=70)) for operator in POOLINGS),
]


def groups_of(batch: int) -> ConvSample:
    return grouped(f"batch_{batch}", 4, 20, batch=batch, deform_groups=5, size=(19, 13))


def tiles_of(batch: int) -> ConvSample:
    return ConvSample(f"batch_{batch}", batch=batch, channels=100, out_channels=72, size=(19, 13))


@pytest.mark.instruction_set
@pytest.mark.parametrize("threads", THREADS)
@parametrize_cases(
    [
        *SHARED,
        *(Case("deform_conv2d", GROUPED, groups_of(batch)) for batch in (1, 2, 3)),
        *(Case("deform_conv2d", TILED, tiles_of(batch), torch.bfloat16, torch.channels_last) for batch in (1, 3)),
    ]
)
def test_any_number_of_threads(case: Case, threads: int) -> None:
    with number_of_threads(threads):
        case.check()


# Three images and more: a sum of only two threads' shares is the same in either order.
BITS = ConvSample("bits", batch=3, channels=32, size=(20, 20))
CLOSE = ConvSample("close", batch=3, channels=32, out_channels=16, size=(23, 29), deform_groups=2, spread=4.0)
# Many RoIs on the same pixels.
CROWD = RoiSample("crowd", channels=70, rois=tuple((k % 2, 2.0 + k, 3.0 + k / 2, 30.0 + k, 40.0 - k) for k in range(9)))
SEVERAL_DTYPES = [
    *(("deform_conv2d", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
    *(("modulated_deform_conv2d", dtype) for dtype in (torch.float32, torch.bfloat16)),
]
CPU_CASES = [
    Case("deform_conv2d", CPU, BITS, torch.float32),
    *(Case(operator, CPU, CLOSE, dtype) for operator, dtype in SEVERAL_DTYPES),
    *(Case(operator, CPU, CROWD, dtype) for operator in POOLINGS for dtype in (torch.float32, torch.bfloat16)),
    *(Case("deform_conv2d", GROUPED, groups_of(batch), torch.float32) for batch in (1, 2, 3)),
    *(Case("deform_conv2d", TILED, tiles_of(batch), torch.bfloat16) for batch in (1, 3)),
]


def repeated(run: Callable[[], Any], times: int = 2) -> list[Any]:
    """What a function gives, again and again, as it is and under `torch.use_deterministic_algorithms`."""
    found = [run() for _ in range(times)]
    torch.use_deterministic_algorithms(True)  # new memory is NaN then: what was never written shows as well
    try:
        return found + [run() for _ in range(times)]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.determinism
@pytest.mark.parametrize("threads", THREADS)
@parametrize_cases(CPU_CASES)
def test_same_bits_from_run_to_run(case: Case, threads: int) -> None:
    operands = case.operands()
    with number_of_threads(threads):
        assert_same_bits(*repeated(lambda: results(case.operator, case.sample, operands)))


@pytest.mark.determinism
@parametrize_cases(Case(operator, CUDA, CLOSE, dtype) for operator, dtype in SEVERAL_DTYPES)
def test_same_bits_from_run_to_run_on_a_gpu(case: Case) -> None:
    operands = case.operands()
    assert_same_bits(*repeated(lambda: results(case.operator, case.sample, operands)))


@pytest.mark.determinism
@parametrize_cases(CPU_CASES)
def test_outputs_have_the_same_bits_on_any_number_of_threads(case: Case) -> None:
    """Gradients need not: threads that share a sum add it in another order than one thread does."""
    found = []
    for threads in THREADS:
        with number_of_threads(threads):
            found.append({"output": compiled(case.operator, case.sample, **case.operands())})
    assert_same_bits(*found)
