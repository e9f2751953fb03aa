# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Inputs for the operators' tests: samples are data, the checks in the test files are generic."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")),
]


@contextlib.contextmanager
def number_of_threads(count: int) -> Iterator[None]:
    """Sets the number of threads of the process, which other tests use too, and sets it back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class ConvSample:
    """Sizes of one deform_conv2d call; `spread` is the offsets' standard deviation in pixels."""

    name: str
    batch: int = 2
    channels: int = 4
    out_channels: int = 6
    size: tuple[int, int] = (7, 9)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    deform_groups: int = 1
    mask: bool = True
    bias: bool = True
    spread: float = 2.0

    @property
    def geometry(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def out_size(self) -> list[int]:
        sizes = zip(self.size, self.padding, self.dilation, self.kernel, self.stride)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes]

    def tensors(self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """Random operands by name; mask and bias are left out where the sample has none."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

        taps = self.kernel[0] * self.kernel[1]
        operands = {
            "input": normal(self.batch, self.channels, *self.size),
            "offset": normal(self.batch, 2 * self.deform_groups * taps, *self.out_size) * self.spread,
            "weight": normal(self.out_channels, self.channels // self.groups, *self.kernel),
        }
        if self.bias:
            operands["bias"] = normal(self.out_channels)
        if self.mask:
            operands["mask"] = normal(self.batch, self.deform_groups * taps, *self.out_size).sigmoid()
        return operands


CONV_SAMPLES = [
    ConvSample("plain", mask=False, bias=False),
    ConvSample("modulated"),
    ConvSample("uneven", kernel=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    ConvSample("grouped", channels=8, out_channels=4, groups=4, mask=False),
    ConvSample("deform_groups", channels=8, deform_groups=4, stride=(2, 2)),
    ConvSample("groups_across_deform_groups", channels=12, out_channels=6, groups=3, deform_groups=2),
    ConvSample("deform_groups_across_groups", channels=12, out_channels=4, groups=2, deform_groups=3),
    ConvSample("depthwise", channels=6, out_channels=6, groups=6, deform_groups=6),
    ConvSample("pointwise", kernel=(1, 1), padding=(0, 0)),
    ConvSample("dilated", dilation=(2, 3), padding=(2, 3), size=(9, 11)),
    ConvSample("smaller_than_kernel", size=(2, 1), padding=(2, 2), kernel=(5, 4)),
    ConvSample("one_pixel", size=(1, 1), batch=1),
    ConvSample("leaves_the_image", spread=30.0),
    ConvSample("no_spread", spread=0.0),
    ConvSample("one_row", size=(1, 13), batch=3, out_channels=1),
    ConvSample("many_positions", size=(37, 41), batch=1, channels=2, out_channels=2),
    # Of which CUDA computes every dtype but float64 on tensor cores.
    ConvSample("tensor_cores", channels=16, out_channels=24, deform_groups=2, size=(9, 13)),
    ConvSample("tensor_cores_grouped", channels=32, out_channels=32, groups=8, size=(6, 11), stride=(2, 1)),
]
EMPTY_BATCH = ConvSample("empty_batch", batch=0)


@dataclass(frozen=True)
class RoiSample:
    """Sizes of one call of a RoI pooling operator; `geometry` has the arguments that not all of them have."""

    name: str
    batch: int = 2
    channels: int = 3
    size: tuple[int, int] = (10, 13)
    output_size: tuple[int, int] = (3, 2)
    spatial_scale: float = 0.25
    offset: bool = True
    mask: bool = True
    rois: tuple[tuple[float, ...], ...] = (
        (0, 2.3, 3.1, 40.7, 33.9),
        (1, -12.0, 5.0, 21.5, 70.0),  # leaves the image on the left and at the bottom
        (1, 11.0, 7.5, 13.0, 8.25),  # smaller than a pixel of the map
    )
    geometry: dict[str, Any] = field(default_factory=dict)
    input_channels: int | None = None
    offset_shape: tuple[int, int, int] | None = None  # of one RoI; the default is one pair for each bin

    @property
    def arguments(self) -> dict[str, Any]:
        return {"output_size": self.output_size, "spatial_scale": self.spatial_scale} | self.geometry

    def tensors(self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Random operands by name; offset is None where the sample has none, a missing mask is left out."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

        half = dtype in (torch.float16, torch.bfloat16)
        rois = torch.tensor(self.rois, dtype=torch.float32 if half else dtype, device=device).reshape(-1, 5)
        operands: dict[str, Any] = {
            "input": normal(self.batch, self.input_channels or self.channels, *self.size),
            "rois": rois,
            "offset": normal(len(self.rois), *(self.offset_shape or (2, *self.output_size))) if self.offset else None,
        }
        if self.mask:
            operands["mask"] = normal(len(self.rois), 1, *self.output_size).sigmoid()
        return operands


COMMON_ROI_SAMPLES = [
    RoiSample("plain", offset=False, mask=False),
    RoiSample("deformable", mask=False),
    RoiSample("modulated"),
    RoiSample("mask_without_offset", offset=False),
    RoiSample("image_pixels", spatial_scale=1.0),
    RoiSample("one_pixel_map", size=(1, 1)),
    RoiSample("no_rois", rois=()),
]
ROI_SAMPLES = [
    *COMMON_ROI_SAMPLES,
    RoiSample("fixed_grid", geometry={"sampling_ratio": 3}),
    RoiSample("one_bin", output_size=(1, 1), geometry={"gamma": 0.5}),
    RoiSample("far_shifts", geometry={"gamma": 2.0}),
    RoiSample("reversed_roi", geometry={"sampling_ratio": 2}, rois=((0, 30.0, 25.0, 4.0, 6.0),)),
]
PSROI_SAMPLES = [
    *COMMON_ROI_SAMPLES,
    RoiSample("one_sample", geometry={"sample_per_part": 1}),
    RoiSample("far_shifts", geometry={"trans_std": 2.0}),
    RoiSample("reversed_roi", rois=((0, 30.0, 25.0, 4.0, 6.0),)),  # takes the least size
    RoiSample("half_way_corners", rois=((0, 2.5, 3.5, 20.5, 22.5), (1, -2.5, -0.5, 7.5, 9.5)), spatial_scale=1.0),
    RoiSample("position_sensitive", input_channels=3 * 4, geometry={"group_size": 2}),
    RoiSample("coarse_parts", offset_shape=(2, 2, 1), geometry={"part_size": (2, 1)}),
    RoiSample("classes", channels=4, offset_shape=(4, 3, 2)),
    RoiSample(
        "everything",
        channels=4,
        output_size=(4, 5),
        input_channels=4 * 9,
        offset_shape=(4, 2, 3),
        geometry={"group_size": 3, "part_size": (2, 3), "sample_per_part": 2, "trans_std": 0.3},
    ),
]


def by_name(sample: ConvSample | RoiSample) -> str:
    return sample.name


def turned_columns(tensor: Tensor) -> Tensor:
    """A tensor of one column, in memory a row: contiguous, with another stride for columns than for rows."""
    row = tensor.transpose(2, 3)
    turned = torch.empty_like(row, memory_format=torch.contiguous_format).copy_(row).transpose(2, 3)
    assert turned.is_contiguous() and turned.stride(3) != turned.stride(2)
    return turned


def shifted(tensor: Tensor) -> Tensor:
    """The same values and strides, where memory is aligned to no more than an element."""
    return tensor.new_empty(tensor.numel() + 1).as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


def gradients(function: Callable[..., Tensor], operands: dict[str, Any], seed: int = 1) -> dict[str, Tensor]:
    """Output, and the gradient of every floating operand but `rois`, for a fixed random output gradient."""
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_(name != "rois")
        if isinstance(t, Tensor)
        else t
        for name, t in operands.items()
    }
    output = function(**leaves)
    wanted = {name: t for name, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad}
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = torch.autograd.grad(
        output, list(wanted.values()), grad.to(output), allow_unused=True, materialize_grads=True
    )
    return {"output": output.detach()} | dict(zip(wanted, found))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compares output and gradients by name, relative to the largest expected value of each."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(value.abs().max()) if value.numel() else 0.0, 1.0)
        torch.testing.assert_close(
            actual[name].to(value), value, rtol=0, atol=tolerance * scale, msg=lambda text: f"{name}: {text}"
        )
