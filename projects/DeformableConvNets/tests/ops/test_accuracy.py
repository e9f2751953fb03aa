# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""How far results are from a float64 reference, for random operands of a layer's size, dtype by dtype.

Offsets are odd multiples of 1/32 and RoIs lie on such a grid that every dtype holds positions exactly, and none is a
whole number. At whole numbers the gradient jumps: rounding alone could make any difference there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from dcn_d2.ops import (
    deform_conv2d,
    deform_psroi_pool,
    deform_roi_pool,
    modulated_deform_conv2d,
    reference,
    split_offset_and_mask,
)

from .checks import NORM_TOLERANCE, assert_norms_close, gradients, in_float64
from .paths import DEVICES

# "tf32" is float32 where torch allows TF32.
TOLERANCE = {str(dtype).removeprefix("torch."): value for dtype, value in NORM_TOLERANCE.items()} | {"tf32": 1e-3}
parametrize = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param(device, dtype, id=f"{dtype}-{device}")
        for device in ("cpu", "cuda")
        for dtype in TOLERANCE
        if not (device == "cpu" and dtype == "tf32")
    ],
)


@pytest.fixture(autouse=True)
def precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Allows TF32 in the tests that are about it."""
    torch.backends.cudnn.allow_tf32 = request.node.callspec.params.get("dtype") == "tf32"
    yield
    torch.backends.cudnn.allow_tf32 = False


class Draw:
    """Random operands, from the seed that conftest.py gives each test: `DCN_TEST_SEED=random` draws new ones."""

    def __init__(self, device: str, dtype: str) -> None:
        self.device = device
        self.dtype = torch.float32 if dtype == "tf32" else getattr(torch, dtype)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size).to(self.device, self.dtype)

    def offset(self, *size: int) -> Tensor:
        whole = torch.randint(-64, 64, size)
        return ((2 * whole + 1) / 32).to(self.device, self.dtype)


def check(function: Callable[..., Tensor], oracle: Callable[..., Tensor], operands: dict[str, Any], dtype: str) -> None:
    """Compares output and all gradients with those of `oracle` for the same operands in float64."""
    expected = gradients(oracle, in_float64(operands))
    assert_norms_close(gradients(function, operands), expected, TOLERANCE[dtype])


# Channels per conv group, numbers of groups and of deform groups are those of models.
LAYERS = {
    "plain": {},
    "modulated": {"mask": True},
    "deform_groups": {"mask": True, "deform_groups": 4},
    "grouped": {"mask": True, "groups": 16},
    "strided": {"mask": True, "stride": 2},
    "nhwc": {"mask": True, "channels_last": True},
}
# On a GPU these take tiles of all widths. The sums of some are split, those of others are not.
WIDE = {
    "128_channels": {"channels": 128, "size": (60, 70)},
    "128_channels_of_many": {"channels": 128, "size": (100, 90)},
    "256_channels": {"channels": 256, "size": (50, 40), "channels_last": True},
    "256_channels_in_4_groups": {"channels": 256, "size": (50, 80), "groups": 4, "channels_last": True},
    "512_channels": {"channels": 512, "size": (25, 38), "batch": 1},
}


def layer(draw: Draw, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    groups, stride = changes.get("groups", 1), changes.get("stride", 1)
    batch, channels, points = changes.get("batch", 2), changes.get("channels", 64), 9 * changes.get("deform_groups", 1)
    height, width = changes.get("size", (20, 27))
    operands = {
        "input": draw.normal(batch, channels, height * stride, width * stride),
        "offset": draw.offset(batch, 2 * points, height, width),
        "weight": draw.normal(channels, channels // groups, 3, 3) / 16,
        "bias": draw.normal(channels),
    }
    if changes.get("mask"):
        operands["mask"] = draw.normal(batch, points, height, width).sigmoid()
    if changes.get("channels_last"):
        operands["input"] = operands["input"].contiguous(memory_format=torch.channels_last)
    return operands, {"stride": (stride, stride), "padding": (1, 1), "dilation": (1, 1)}


@parametrize
@pytest.mark.parametrize("name", LAYERS)
def test_deform_conv2d_against_float64(name: str, device: str, dtype: str) -> None:
    operands, geometry = layer(Draw(device, dtype), **LAYERS[name])

    def oracle(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
        return reference.deform_conv2d(input, offset, weight, bias, mask=mask, **geometry)

    check(functools.partial(deform_conv2d, **geometry), oracle, operands, dtype)


def check_offset_branch(draw: Draw, dtype: str, changes: dict[str, Any]) -> None:
    """Checks modulated_deform_conv2d, whose offsets and logits are one tensor."""
    operands, geometry = layer(draw, **changes | {"mask": True})
    logits = draw.normal(*operands.pop("mask").shape)
    operands["offset_and_mask"] = torch.cat([operands.pop("offset"), logits], 1)
    if changes.get("channels_last"):
        operands["offset_and_mask"] = operands["offset_and_mask"].contiguous(memory_format=torch.channels_last)

    def oracle(input: Tensor, offset_and_mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        offset, mask = split_offset_and_mask(offset_and_mask)
        return reference.deform_conv2d(input, offset, weight, bias, mask=mask, **geometry)

    check(functools.partial(modulated_deform_conv2d, **geometry), oracle, operands, dtype)


@parametrize
@pytest.mark.parametrize("name", ["modulated", "deform_groups", "grouped", "strided", "nhwc"])
def test_modulated_deform_conv2d_against_float64(name: str, device: str, dtype: str) -> None:
    check_offset_branch(Draw(device, dtype), dtype, LAYERS[name])


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", WIDE)
def test_wide_layers_against_float64(name: str, device: str, dtype: str) -> None:
    check_offset_branch(Draw(device, dtype), dtype, WIDE[name])


@pytest.mark.unsanitized
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LAYERS)
def test_deform_conv2d_against_torchvision(name: str, device: str) -> None:
    operands, geometry = layer(Draw(device, "float32"), **LAYERS[name])
    theirs = gradients(functools.partial(torchvision.ops.deform_conv2d, **geometry), operands)
    ours = gradients(functools.partial(deform_conv2d, **geometry), operands)
    assert_norms_close(ours, theirs, 2 * TOLERANCE["float32"])


def pooling(draw: Draw, channels_last: bool = False) -> dict[str, Any]:
    """8 RoIs on maps at a quarter of the image: 8 x 8 bins of 2 x 2 or 4 x 4 samples, all on the grid."""
    rois = torch.tensor(
        [[k % 2, 8.0 * k, 4.0 * k, 8.0 * k + (64 << k % 2), 4.0 * k + 128] for k in range(8)], device=draw.device
    )
    input = draw.normal(2, 64, 50, 60)
    return {
        "input": input.contiguous(memory_format=torch.channels_last) if channels_last else input,
        "rois": rois.to(torch.float64 if draw.dtype == torch.float64 else torch.float32),
        "offset": draw.offset(8, 2, 8, 8),
        "mask": draw.normal(8, 1, 8, 8).sigmoid(),
    }


POOLINGS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]] = {
    "roi": (deform_roi_pool, reference.deform_roi_pool, {"gamma": 0.125}),
    "roi_fixed": (deform_roi_pool, reference.deform_roi_pool, {"gamma": 0.125, "sampling_ratio": 2}),
    # Its RoIs include their last pixel: they are 1/4 longer, so that positions are not on the grid.
    "psroi": (deform_psroi_pool, reference.deform_psroi_pool, {"trans_std": 0.125}),
}


@parametrize
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", POOLINGS)
def test_roi_pooling_against_float64(name: str, channels_last: bool, device: str, dtype: str) -> None:
    operator, oracle, geometry = POOLINGS[name]
    arguments = {"output_size": (8, 8), "spatial_scale": 0.25} | geometry
    operands = pooling(Draw(device, dtype), channels_last)
    check(functools.partial(operator, **arguments), functools.partial(oracle, **arguments), operands, dtype)


@pytest.mark.unsanitized
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampling", [0, 2])
def test_roi_pooling_against_torchvision(sampling: int, device: str) -> None:
    operands = pooling(Draw(device, "float32"))
    rois = operands["rois"] + torch.tensor([0, 0.3, 0.3, 0.3, 0.3]).to(operands["rois"])  # all but the image

    def ours(input: Tensor) -> Tensor:
        return deform_roi_pool(input, rois, None, 7, 0.25, sampling)

    def theirs(input: Tensor) -> Tensor:
        return torchvision.ops.roi_align(input, rois, 7, 0.25, sampling or -1, aligned=True)

    only = {"input": operands["input"]}
    assert_norms_close(gradients(ours, only), gradients(theirs, only), 2 * TOLERANCE["float32"])
