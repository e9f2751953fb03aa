# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Outputs and gradients of every operator on every path: equal to the reference's, and to torchvision's operators."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torchvision

from dcn_d2.ops import deform_roi_pool

from .checks import TOLERANCE, assert_same, gradients, results
from .paths import DEVICES, Case, all_cases, parametrize_cases
from .samples import CONV_SAMPLES, POOLINGS, ConvSample, RoiSample, by_name


def marks_of(case: Case) -> list[Any]:
    """Marks the few small cases on a GPU that the memory accesses of each kernel are checked with."""
    small = ("modulated",) if case.operator in POOLINGS else ("uneven", "tensor_cores", "tensor_cores_grouped")
    return [pytest.mark.memcheck] if case.device == "cuda" and case.sample.name in small else []


@pytest.mark.instruction_set
@parametrize_cases(all_cases(), marks_of)
def test_equals_reference(case: Case) -> None:
    case.check()


@pytest.mark.unsanitized
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sample", CONV_SAMPLES, ids=by_name)
def test_equals_torchvision(sample: ConvSample, device: str) -> None:
    operands = sample.tensors(torch.float64, device)
    expected = gradients(functools.partial(torchvision.ops.deform_conv2d, **sample.geometry), operands)
    actual = results("deform_conv2d", sample, operands)
    if sample.spread == 0:  # samples at exactly -1: see test_offset_gradient_at_the_window
        del actual["offset"], expected["offset"]
    assert_same(actual, expected, TOLERANCE[torch.float64])


@pytest.mark.unsanitized
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 5])
def test_zero_offset_equals_torchvision_roi_align(sampling_ratio: int, device: str) -> None:
    sample = RoiSample("align", geometry={"sampling_ratio": sampling_ratio})
    operands = sample.tensors(torch.float64, device)
    expected = torchvision.ops.roi_align(
        operands["input"], operands["rois"], (3, 2), sample.spatial_scale, sampling_ratio, aligned=True
    )
    for offset in (None, torch.zeros_like(operands["offset"])):
        actual = deform_roi_pool(operands["input"], operands["rois"], offset, **sample.arguments)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
