# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Sizes at the borders of what the kernels handle at a time, and at the borders of what there can be."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dcn_d2.ops
from dcn_d2.ops import deform_conv2d, deform_psroi_pool, reference

from .samples import ConvSample, RoiSample, assert_same, by_name, gradients

POOLS = ["deform_roi_pool", "deform_psroi_pool"]
HUGE = 2**32
TOO_LARGE = r"must be two numbers of at most 2147483647, got \[4294967296, 1\]"
EMPTY_ROI_SAMPLES = [RoiSample("no_channels", channels=0), RoiSample("no_rows", size=(0, 4))]


def check_conv(sample: ConvSample, dtype: torch.dtype = torch.float64, channels_last: bool = False) -> None:
    """Compares output and gradients with the reference's."""
    operands = sample.tensors(dtype)
    # Positions that float32 holds exactly: one that it rounds to the other side of a pixel has another derivative.
    operands["offset"] = ((operands["offset"] * 64).floor() + 0.5) / 64
    exact = {name: t.double() for name, t in operands.items()}
    if channels_last:
        operands["input"] = operands["input"].contiguous(memory_format=torch.channels_last)

    def oracle(**tensors: Any) -> Tensor:
        return reference.deform_conv2d(**{"bias": None, "mask": None} | tensors, **sample.geometry)

    actual = gradients(functools.partial(deform_conv2d, **sample.geometry), operands)
    assert_same(actual, gradients(oracle, exact), 1e-10 if dtype == torch.float64 else 1e-4)


# Channels and output channels: whole vectors and panels of them, and one more or less.
WIDTHS = [(16, 64), (17, 65), (31, 32), (64, 33), (70, 127)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("widths", WIDTHS)
def test_width(widths: tuple[int, int], dtype: torch.dtype, channels_last: bool) -> None:
    sample = ConvSample("width", channels=widths[0], out_channels=widths[1], size=(5, 5), kernel=(1, 2))
    check_conv(sample, dtype, channels_last)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_width(data: st.DataObject) -> None:
    """Channels and positions that leave rests of vectors, panels and tiles."""

    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups, deform_groups = data.draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 2), (4, 4), (8, 1)]))
    kernel = data.draw(st.sampled_from([(1, 1), (3, 3), (2, 1)]))
    sample = ConvSample(
        "any",
        batch=number(1, 2),
        channels=groups * deform_groups * number(1, 70 // (groups * deform_groups)),
        out_channels=groups * number(1, 70 // groups),
        size=(number(kernel[0], 20), number(kernel[1], 20)),
        kernel=kernel,
        padding=(kernel[0] // 2, kernel[1] // 2),
        groups=groups,
        deform_groups=deform_groups,
        mask=data.draw(st.booleans()),
    )
    check_conv(sample, data.draw(st.sampled_from([torch.float64, torch.float32])), data.draw(st.booleans()))


@pytest.mark.parametrize(
    "sample",
    [
        ConvSample("no_outputs", out_channels=0),
        ConvSample("no_rows", size=(0, 3), kernel=(2, 2), channels=8, deform_groups=2),
    ],
    ids=by_name,
)
def test_empty_convolution(sample: ConvSample) -> None:
    check_conv(sample)


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("sample", EMPTY_ROI_SAMPLES, ids=by_name)
def test_empty_pooling(name: str, sample: RoiSample) -> None:
    operands = sample.tensors()
    expected = gradients(functools.partial(getattr(reference, name), **sample.arguments), operands)
    assert_same(gradients(functools.partial(getattr(dcn_d2.ops, name), **sample.arguments), operands), expected, 1e-10)


def test_last_pixel_of_a_map_longer_than_float32_counts() -> None:
    # 2^24 + 3, the last pixel's number, rounds to 2^24 + 4.
    image = torch.zeros(1, 1, 1, 2**24 + 4)
    image[..., -1] = 3
    rois = torch.tensor([[0, 2.0**24 + 4, 0, 2.0**24 + 5, 0]])
    assert deform_psroi_pool(image, rois, None, (1, 1), sample_per_part=1).item() == 3


@pytest.mark.parametrize("argument", ["stride", "padding", "dilation"])
def test_huge_geometry_is_refused(argument: str) -> None:
    operands = ConvSample("huge").tensors()
    with pytest.raises(RuntimeError, match=f"{argument} {TOO_LARGE}"):
        deform_conv2d(**operands, **{argument: (HUGE, 1)})


@pytest.mark.parametrize("name", POOLS)
def test_huge_output_size_is_refused(name: str) -> None:
    operands = RoiSample("huge", offset=False, mask=False).tensors()
    with pytest.raises(RuntimeError, match=f"output_size {TOO_LARGE}"):
        getattr(dcn_d2.ops, name)(**operands, output_size=(HUGE, 1))


def test_huge_group_size_is_refused() -> None:
    operands = RoiSample("huge", offset=False, mask=False).tensors()
    with pytest.raises(RuntimeError, match="group_size must be at most 2147483647, got 4294967296"):
        deform_psroi_pool(**operands, output_size=2, group_size=HUGE)
