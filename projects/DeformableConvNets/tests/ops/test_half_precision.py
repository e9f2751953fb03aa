# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Half precision: autocast, positions in float32 beside operands of half precision, and sums that are not rounded."""

from __future__ import annotations

import pytest
import torch

from dcn_d2.ops import deform_conv2d

from .checks import TOLERANCE, assert_same, compiled, expected_results, results
from .paths import DEVICES
from .samples import CONV_SAMPLES, POOLINGS, ConvSample, RoiSample, by_name, operands_of

HALF = [torch.bfloat16, torch.float16]
POSITIONS = ("offset", "mask", "offset_and_mask")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("operator", ["deform_conv2d", "modulated_deform_conv2d"])
def test_autocast_stays_half(operator: str, mixed: bool, dtype: torch.dtype, device: str) -> None:
    sample = CONV_SAMPLES[1]
    operands = operands_of(operator, sample, torch.float32, device)
    if mixed:  # as the layers before leave it
        operands["input"] = operands["input"].to(dtype)
    with torch.autocast(device, dtype):
        found = results(operator, sample, operands)
    assert found["output"].dtype == dtype
    assert all(found[name].dtype == t.dtype for name, t in operands.items())
    # The CPU's kernels take positions in float32.
    rounded = {n: t if device == "cpu" and n in POSITIONS else t.to(dtype) for n, t in operands.items()}
    assert_same(found, expected_results(operator, sample, rounded), TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operator", POOLINGS)
def test_autocast_keeps_rois_in_float32(operator: str, device: str) -> None:
    sample = RoiSample("autocast", size=(60, 80), rois=((0, 1001.3, 900.7, 1207.9, 955.1),), spatial_scale=0.0625)
    operands = sample.tensors(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        actual = compiled(operator, sample, **operands)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), compiled(operator, sample, **operands), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("sample", CONV_SAMPLES, ids=by_name)
def test_half_precision_with_positions_in_float32(sample: ConvSample, dtype: torch.dtype) -> None:
    operands = {n: t if n in POSITIONS else t.to(dtype) for n, t in sample.tensors(torch.float32).items()}
    found = results("deform_conv2d", sample, operands)
    assert all(found[name].dtype == tensor.dtype for name, tensor in operands.items())
    assert_same(found, expected_results("deform_conv2d", sample, operands), TOLERANCE[dtype])
    meta = compiled("deform_conv2d", sample, **{n: t.to("meta") for n, t in operands.items()})
    assert meta.dtype == dtype and meta.shape == found["output"].shape


def test_sums_are_not_rounded_on_the_way() -> None:
    # 4096 ones and as many of 1/64: in bfloat16 sums beyond 256 would stay where they are.
    image = torch.ones(1, 8192, 1, 1, dtype=torch.bfloat16)
    image[:, 4096:] = 1 / 64
    weight = torch.ones(1, 8192, 1, 1, dtype=torch.bfloat16)
    output = deform_conv2d(image, torch.zeros(1, 2, 1, 1, dtype=torch.bfloat16), weight)
    assert output.item() == 4160.0
