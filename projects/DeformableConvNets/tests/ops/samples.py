# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the operators' tests compute: sizes of calls as data, and random operands of these sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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
    def arguments(self) -> dict[str, Any]:
        """What the call takes besides tensors."""
        return self.geometry

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
    # CUDA computes these on tensor cores, in every dtype except float64.
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
        """What the call takes besides tensors."""
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


Sample = ConvSample | RoiSample
CONVOLUTIONS = ("deform_conv2d", "modulated_deform_conv2d")
POOLINGS = ("deform_roi_pool", "deform_psroi_pool")
OPERATORS = (*CONVOLUTIONS, *POOLINGS)


def grouped(name: str, group_channels: int, groups: int, **changes: Any) -> ConvSample:
    """A convolution with as many output channels as input channels, in every group."""
    channels = group_channels * groups
    return ConvSample(name, channels=channels, out_channels=channels, groups=groups, **changes)


# The CPU has a path for many small groups with as many outputs as inputs: these are such shapes, and their neighbours.
# A vector holds 2 to 16 channels: each size of group is less than one, one, or several of them somewhere.
GROUPED_SAMPLES = [
    grouped("depthwise", 1, 48),
    grouped("2_channels", 2, 24, kernel=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    grouped("4_channels", 4, 12, deform_groups=3),
    grouped("8_channels", 8, 4, mask=False, bias=False),
    grouped("16_channels", 16, 5, stride=(2, 2), size=(11, 13)),
    grouped("32_channels", 32, 2, deform_groups=2),
    grouped("64_channels", 64, 2, batch=1),
    grouped("rest_of_a_vector", 4, 5),
    grouped("deform_groups_cut_vectors", 4, 12, deform_groups=12),
    grouped("deform_groups_cut_groups", 16, 2, deform_groups=8),
    grouped("3_channels", 3, 16),
    ConvSample("other_outputs", channels=32, out_channels=64, groups=8),
    grouped("many_positions", 4, 8, size=(23, 29), batch=3),
    grouped("one_position", 8, 4, size=(1, 1)),
    grouped("no_spread", 8, 4, spread=0.0),
    grouped("leaves_the_image", 4, 8, spread=30.0),
]

# The CPU has a path for bfloat16 where the processor has matrix tiles. Tiles are 16 rows of 32 values, and pairs of
# them are multiplied at a time: these are shapes that fill tiles, and shapes that do not.
TILED_SAMPLES = [
    ConvSample("one_channel", channels=1, out_channels=1),
    ConvSample("less_than_a_tile", channels=7, out_channels=5),
    ConvSample("one_tile", channels=32, out_channels=16),
    ConvSample("rest_of_a_block", channels=33, out_channels=17),
    ConvSample("odd_rest", channels=47, out_channels=31, batch=1),
    ConvSample("three_tiles", channels=96, out_channels=48),
    ConvSample("three_panels", channels=64, out_channels=81, size=(5, 6)),
    ConvSample("one_position", channels=40, out_channels=24, size=(1, 1)),
    ConvSample("odd_positions", channels=40, out_channels=24, size=(5, 9)),
    ConvSample("several_tiles_of_positions", channels=16, out_channels=16, size=(29, 37)),
    ConvSample("several_segments", channels=160, out_channels=200, size=(6, 7)),
    ConvSample("deform_groups", channels=72, out_channels=40, deform_groups=3),
    ConvSample("deform_groups_cut_blocks", channels=80, out_channels=20, deform_groups=20),
    ConvSample("groups", channels=96, out_channels=60, groups=2),
    ConvSample("groups_across_deform_groups", channels=120, out_channels=30, groups=3, deform_groups=5),
    ConvSample("strided", channels=48, out_channels=48, stride=(2, 3), padding=(0, 2), size=(13, 17)),
    ConvSample("large_kernel", channels=34, out_channels=18, kernel=(5, 4), dilation=(2, 1), padding=(4, 2)),
    ConvSample("pointwise", channels=64, out_channels=64, kernel=(1, 1), padding=(0, 0), mask=False, bias=False),
    ConvSample("no_mask", channels=64, out_channels=32, mask=False),
    ConvSample("leaves_the_image", channels=36, out_channels=20, spread=30.0),
]

# The last one has a path of its own on the CPU, as GROUPED_SAMPLES have.
MODULATED_SAMPLES = [
    *(sample for sample in CONV_SAMPLES if sample.mask),
    grouped("resnext", 4, 8, deform_groups=2),
]

# Sizes of one and of zero, where strides have no one meaning.
STRIDE_CONVOLUTIONS = [
    ConvSample("usual", channels=4),
    ConvSample("one_image", batch=1, channels=8, out_channels=8),
    ConvSample("one_channel", channels=1, out_channels=1),
    ConvSample("one_channel_to_many", channels=1, out_channels=5, batch=1),
    ConvSample("one_pixel", size=(1, 1)),
    ConvSample("one_row", size=(1, 6), batch=1),
    ConvSample("one_column", size=(6, 1)),
    ConvSample("pointwise", kernel=(1, 1), padding=(0, 0)),
    ConvSample("one_output", size=(3, 3), padding=(0, 0)),
    ConvSample("empty_batch", batch=0),
    ConvSample("no_outputs", out_channels=0),
    ConvSample("grouped", channels=32, out_channels=32, groups=8),
    ConvSample("depthwise", channels=6, out_channels=6, groups=6, deform_groups=6),
]
STRIDE_POOLINGS = [
    RoiSample("usual"),
    RoiSample("one_image", batch=1, rois=((0, 2.3, 3.1, 40.7, 33.9),)),
    RoiSample("one_channel", channels=1),
    RoiSample("one_pixel", size=(1, 1)),
    RoiSample("one_bin", output_size=(1, 1)),
    RoiSample("no_rois", rois=()),
    RoiSample("no_channels", channels=0),
]
STRIDE_SAMPLES: list[tuple[str, Sample]] = [
    *(
        (name, sample)
        for name in CONVOLUTIONS
        for sample in STRIDE_CONVOLUTIONS
        if name == "deform_conv2d" or sample.mask
    ),
    *((name, sample) for name in POOLINGS for sample in STRIDE_POOLINGS),
    (
        "deform_psroi_pool",
        RoiSample("cells", input_channels=12, geometry={"group_size": 2, "part_size": [2, 1]}, offset_shape=(2, 2, 1)),
    ),
]


def by_name(sample: Sample) -> str:
    return sample.name


def operands_of(
    operator: str, sample: Sample, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """The sample's tensors by the names of this operator's arguments."""
    operands = sample.tensors(dtype, device, seed)
    if operator == "modulated_deform_conv2d":
        logits = operands.pop("mask").double().logit().to(dtype)
        operands["offset_and_mask"] = torch.cat([operands.pop("offset"), logits], dim=1)
    return operands


def on_a_grid(operands: dict[str, Any], steps: int = 64) -> dict[str, Any]:
    """The operands with offsets half-way between the numbers n / `steps`, which dtypes of enough bits hold exactly.

    No such offset is a whole number. At whole numbers the gradient jumps: a position that is rounded to the other side
    of a pixel has another derivative.
    """
    return operands | {"offset": ((operands["offset"] * steps).floor() + 0.5) / steps}
