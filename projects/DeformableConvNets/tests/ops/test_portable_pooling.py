# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The poolings made of operators that other runtimes know give the values of the operators."""

from __future__ import annotations

import pytest
import torch

from dcn_d2 import ops
from dcn_d2.ops import portable_pooling
from dcn_d2.ops.portable import portable_operators

from .samples import PSROI_SAMPLES, ROI_SAMPLES, RoiSample

inf, nan = float("inf"), float("nan")
# Sizes of bins that are whole numbers of pixels: here rounding could change the number of samples.
WHOLE_BINS = RoiSample(
    "whole_bins",
    size=(40, 50),
    output_size=(7, 7),
    rois=tuple((i % 2, 3.1 * i, 2.3 * i, 3.1 * i + 28 * (1 + i % 4), 2.3 * i + 28 * (1 + i % 3)) for i in range(20)),
)
WILD = RoiSample(
    "wild_rois",
    rois=(
        (0, 3.0, 4.0, 3.0, 20.0),  # no width
        (1, 7.0, 7.0, 7.0, 7.0),
        (0, 0.0, 0.0, 0.0, 0.0),
        (0, 20.0, 5.0, 4.0, 30.0),  # reversed in x only
        (1, 500.0, 600.0, 700.0, 650.0),  # off the image
        (1, -300.0, -90.0, -200.0, 10.0),
        (0, nan, 1.0, 20.0, 20.0),
        (0, 1.0, -inf, 20.0, 20.0),
        (1, 1.0, 1.0, inf, inf),
        (1, 2.0, 1.0, 30.0, 30.0),
    ),
)
CALLS = [
    *(("deform_roi_pool", sample) for sample in (*ROI_SAMPLES, WHOLE_BINS, WILD)),
    *(("deform_psroi_pool", sample) for sample in (*PSROI_SAMPLES, WHOLE_BINS, WILD)),
]
DIFFERENCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", DIFFERENCES, ids=str)
@pytest.mark.parametrize("name, sample", CALLS, ids=[f"{name}-{sample.name}" for name, sample in CALLS])
def test_values_are_the_operators(name: str, sample: RoiSample, dtype: torch.dtype) -> None:
    operands = sample.tensors(dtype)
    expected = getattr(ops, name)(**operands, **sample.arguments)
    with portable_operators():
        found = getattr(ops, name)(**operands, **sample.arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=DIFFERENCES[dtype])


@pytest.mark.parametrize("name", ["deform_roi_pool", "deform_psroi_pool"])
def test_wild_offsets_give_zeros(name: str) -> None:
    sample = RoiSample("offsets")
    operands = sample.tensors()
    operands["offset"][0, :, 0, 0] = nan
    operands["offset"][1, 0] = inf
    operands["offset"][2, 1] = 1e30
    expected = getattr(ops, name)(**operands, **sample.arguments)
    found = getattr(portable_pooling, name)(**operands, **sample.arguments)
    assert not found[0, :, 0, 0].any() and not found[1:].any()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["deform_roi_pool", "deform_psroi_pool"])
def test_only_the_switch_changes_what_runs(name: str) -> None:
    def operators() -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            getattr(ops, name)(**sample.tensors(), **sample.arguments)
        return {event.key for event in profile.key_averages()} & {f"dcn_d2::{name}", "torchvision::roi_align"}

    sample = RoiSample("modulated")
    assert operators() == {f"dcn_d2::{name}"}
    with portable_operators():
        assert operators() == {"torchvision::roi_align"}
    assert operators() == {f"dcn_d2::{name}"}
