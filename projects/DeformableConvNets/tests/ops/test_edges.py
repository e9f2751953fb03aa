# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Sizes at the borders of what the kernels handle at a time, and at the borders of what there can be."""

from __future__ import annotations

import pytest
import torch

from dcn_d2.ops import deform_psroi_pool

from .checks import assert_equals_reference, compiled, results
from .paths import CPU, CUDA, TILED, Case, parametrize_cases
from .samples import EMPTY_BATCH, POOLINGS, ConvSample, RoiSample, by_name, on_a_grid

# Channels and output channels: whole vectors and panels of them, and one more or less.
WIDTHS = [(16, 64), (17, 65), (31, 32), (64, 33), (70, 127)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("widths", WIDTHS)
def test_width(widths: tuple[int, int], dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    sample = ConvSample("width", channels=widths[0], out_channels=widths[1], size=(5, 5), kernel=(1, 2))
    operands = on_a_grid(sample.tensors(dtype))
    assert_equals_reference("deform_conv2d", sample, operands, memory_format=memory_format)


@pytest.mark.parametrize(
    "sample",
    [
        ConvSample("no_outputs", out_channels=0),
        ConvSample("no_rows", size=(0, 3), kernel=(2, 2), channels=8, deform_groups=2),
    ],
    ids=by_name,
)
def test_empty_convolution(sample: ConvSample) -> None:
    assert_equals_reference("deform_conv2d", sample, on_a_grid(sample.tensors()))


@pytest.mark.parametrize("operator", POOLINGS)
@pytest.mark.parametrize(
    "sample", [RoiSample("no_channels", channels=0), RoiSample("no_rows", size=(0, 4))], ids=by_name
)
def test_empty_pooling(operator: str, sample: RoiSample) -> None:
    assert_equals_reference(operator, sample, sample.tensors())


@parametrize_cases(
    [
        Case("deform_conv2d", CPU, EMPTY_BATCH, torch.float32),
        Case("deform_conv2d", CUDA, EMPTY_BATCH, torch.float32),
        Case("deform_conv2d", TILED, ConvSample("empty", channels=36, out_channels=20, batch=0), torch.bfloat16),
    ]
)
def test_empty_batch_has_zero_gradients(case: Case) -> None:
    found = results(case.operator, case.sample, case.operands())
    assert found["output"].shape == (0, case.sample.out_channels, *case.sample.out_size)
    assert not found["weight"].any() and not found["bias"].any() and found["input"].shape[0] == 0


def test_last_pixel_of_a_map_longer_than_float32_counts() -> None:
    # 2^24 + 3, the last pixel's number, rounds to 2^24 + 4.
    image = torch.zeros(1, 1, 1, 2**24 + 4)
    image[..., -1] = 3
    rois = torch.tensor([[0, 2.0**24 + 4, 0, 2.0**24 + 5, 0]])
    assert deform_psroi_pool(image, rois, None, (1, 1), sample_per_part=1).item() == 3


@pytest.mark.parametrize("operator", POOLINGS)
def test_rois_in_float32_fit_maps_in_float64(operator: str) -> None:
    # Detectron2's boxes are float32 always.
    sample = RoiSample("mixed")
    operands = sample.tensors(torch.float64)
    operands["rois"] = operands["rois"].float()
    expected = compiled(operator, sample, **operands | {"rois": operands["rois"].double()})
    assert torch.equal(compiled(operator, sample, **operands), expected)
