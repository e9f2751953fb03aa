# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Operands and sizes that the operators refuse, and what the messages say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dcn_d2.ops
from dcn_d2.ops import deform_conv2d

from .checks import compiled
from .samples import CONVOLUTIONS, POOLINGS, ConvSample, RoiSample, operands_of

Refusal = tuple[dict[str, Any], str]
DTYPES = "input must be float64, float32, float16 or bfloat16"

# What is replaced in the operands of a call that succeeds, and what the message must name.
GEOMETRY: list[Refusal] = [
    ({"weight": torch.zeros(6, 4, 3)}, r"weight must have 4 dimensions, got \[6, 4, 3\]"),
    ({"bias": torch.zeros(5)}, r"bias must have shape \[6\], got \[5\]"),
    ({"stride": (0, 1)}, r"stride must be .*at least 1, got \[0, 1\]"),
    ({"padding": (0, -1)}, r"padding must be .*at least 0, got \[0, -1\]"),
    ({"dilation": (1, 0)}, r"dilation must be .*at least 1, got \[1, 0\]"),
    ({"input": torch.zeros(4, 7, 9)}, r"input must have 4 dimensions, got \[4, 7, 9\]"),
    ({"input": torch.zeros(2, 4, 7, 9, dtype=torch.int64)}, DTYPES),
    ({"weight": torch.zeros(6, 3, 3, 3)}, r"input has 4 channels.*weight's 3"),
    ({"weight": torch.zeros(5, 2, 3, 3)}, r"weight has 5 output channels.*2 groups"),
]
ROIS: list[Refusal] = [
    ({"input": torch.zeros(3, 10, 13)}, r"input must have 4 dimensions, got \[3, 10, 13\]"),
    ({"rois": torch.zeros(3, 4)}, r"rois must have shape \[R, 5\], got \[3, 4\]"),
    ({"rois": torch.zeros(5)}, r"rois must have 2 dimensions, got \[5\]"),
    ({"rois": torch.zeros(3, 5, dtype=torch.float64)}, r"rois has dtype .*, but input has"),
    ({"offset": torch.zeros(2, 2, 3, 2)}, r"offset must have shape \[3, 2, 3, 2\], got \[2, 2, 3, 2\]"),
    ({"mask": torch.zeros(3, 2, 3, 2)}, r"mask must have shape \[3, 1, 3, 2\], got \[3, 2, 3, 2\]"),
    ({"mask": torch.zeros(3, 1, 3, 2, dtype=torch.float16)}, r"mask has dtype .*, but input has"),
    ({"input": torch.zeros(2, 3, 10, 13, dtype=torch.int32)}, DTYPES),
    ({"output_size": (0, 2)}, r"output_size must be .*at least 1, got \[0, 2\]"),
]
REFUSED: dict[str, list[Refusal]] = {
    "deform_conv2d": [
        *GEOMETRY,
        ({"offset": torch.zeros(2, 18, 63)}, r"offset must have 4 dimensions, got \[2, 18, 63\]"),
        ({"offset": torch.zeros(2, 17, 7, 9)}, r"offset has 17 channels.*2 \* 3 \* 3"),
        ({"offset": torch.zeros(2, 54, 7, 9)}, r"input has 4 channels.*offset's 3 groups"),
        ({"offset": torch.zeros(2, 18, 6, 9)}, r"offset must have shape \[2, 18, 7, 9\], got \[2, 18, 6, 9\]"),
        ({"offset": torch.zeros(1, 18, 7, 9)}, r"offset must have shape \[2, 18, 7, 9\], got \[1, 18, 7, 9\]"),
        ({"mask": torch.zeros(2, 18, 7, 9)}, r"mask must have shape \[2, 9, 7, 9\], got \[2, 18, 7, 9\]"),
        ({"mask": torch.zeros(2, 9, 7, 8)}, r"mask must have shape \[2, 9, 7, 9\], got \[2, 9, 7, 8\]"),
        ({"weight": torch.zeros(6, 4, 12, 3)}, r"offset has 18 channels.*2 \* 12 \* 3|too small"),
        ({"offset": torch.zeros(2, 18, 7, 9, dtype=torch.float64)}, r"offset has dtype .*, but input has"),
        ({"mask": torch.zeros(2, 9, 7, 9, dtype=torch.float16)}, r"mask has dtype .*, but input has"),
    ],
    "modulated_deform_conv2d": [
        *GEOMETRY,
        ({"offset_and_mask": torch.zeros(2, 18, 7, 9)}, r"offset_and_mask has 18 channels.*3 \* 3 \* 3"),
        ({"offset_and_mask": torch.zeros(2, 27, 63)}, r"offset_and_mask must have 4 dimensions, got \[2, 27, 63\]"),
        (
            {"offset_and_mask": torch.zeros(2, 27, 6, 9)},
            r"offset_and_mask must have shape \[2, 27, 7, 9\], got \[2, 27, 6, 9\]",
        ),
        ({"offset_and_mask": torch.zeros(2, 27, 7, 9, dtype=torch.float64)}, r"offset_and_mask has dtype .*, but"),
    ],
    "deform_roi_pool": [
        *ROIS,
        ({"offset": torch.zeros(3, 1, 3, 2)}, r"offset must have shape \[3, 2, 3, 2\], got \[3, 1, 3, 2\]"),
        ({"sampling_ratio": -1}, r"sampling_ratio must be at least 0, got -1"),
    ],
    "deform_psroi_pool": [
        *ROIS,
        ({"offset": torch.zeros(3, 1, 3, 2)}, r"offset has 1 channels.*the 3 output channels"),
        ({"input": torch.zeros(2, 3, 10, 13), "group_size": 2}, r"input has 3 channels.*group_size\^2 = 4"),
        ({"offset": torch.zeros(3, 3, 3, 2)}, r"offset has 3 channels.*the 3 output channels"),
        ({"offset": torch.zeros(3, 4, 3, 2)}, r"offset has 4 channels.*the 3 output channels"),
        ({"part_size": (2, 2)}, r"offset must have shape \[3, 2, 2, 2\], got \[3, 2, 3, 2\]"),
        ({"part_size": (0, 2)}, r"part_size must be .*at least 1, got \[0, 2\]"),
        ({"group_size": 0}, r"group_size must be at least 1, got"),
        ({"sample_per_part": 0}, r"sample_per_part must be at least 1, got"),
    ],
}


def good(operator: str) -> dict[str, Any]:
    sample: ConvSample | RoiSample = RoiSample("good") if "roi" in operator else ConvSample("good")
    return operands_of(operator, sample, torch.float32) | sample.arguments


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [
        pytest.param(operator, *refusal, id=f"{operator}-{'-'.join(refusal[0])}-{number}")
        for operator, refusals in REFUSED.items()
        for number, refusal in enumerate(refusals)
    ],
)
@pytest.mark.parametrize("path", ["compiled", pytest.param("fake", marks=pytest.mark.unsanitized)])
def test_bad_operands_are_named(operator: str, change: dict[str, Any], message: str, path: str) -> None:
    operands = good(operator) | change
    if path == "fake":
        operands = {name: t.to("meta") if isinstance(t, Tensor) else t for name, t in operands.items()}
    with pytest.raises(RuntimeError, match=f"^{operator}: ({message})"):
        getattr(dcn_d2.ops, operator)(**operands)


OUTSIDE = RoiSample("outside", rois=((0, 1.0, 1.0, 5.0, 5.0), (2, 1.0, 1.0, 5.0, 5.0)))


@pytest.mark.parametrize("operator", POOLINGS)
def test_batch_index_outside_the_batch(operator: str) -> None:
    with pytest.raises(RuntimeError, match=r"rois\[1\] names image 2, but input has 2 images"):
        compiled(operator, OUTSIDE, **OUTSIDE.tensors())


@pytest.mark.gpu
@pytest.mark.parametrize("operator", POOLINGS)
def test_batch_index_outside_the_batch_is_nan_on_a_gpu(operator: str) -> None:
    output = compiled(operator, OUTSIDE, **OUTSIDE.tensors(device="cuda"))
    assert torch.isfinite(output[0]).all() and output[1].isnan().all()


def test_strides_are_numbers_or_pairs() -> None:
    operands = ConvSample("good").tensors()
    torch.testing.assert_close(deform_conv2d(**operands, padding=1), deform_conv2d(**operands, padding=(1, 1)))
    with pytest.raises(ValueError, match=r"stride must be a number or a pair of numbers, got \(1, 2, 3\)"):
        deform_conv2d(**operands, stride=(1, 2, 3))


HUGE = 2**32
TOO_LARGE = r"must be two numbers of at most 2147483647, got \[4294967296, 1\]"


@pytest.mark.parametrize(
    ("operator", "argument"),
    [
        *((operator, argument) for operator in CONVOLUTIONS for argument in ("stride", "padding", "dilation")),
        *((operator, "output_size") for operator in POOLINGS),
    ],
)
def test_huge_sizes_are_refused(operator: str, argument: str) -> None:
    with pytest.raises(RuntimeError, match=f"{argument} {TOO_LARGE}"):
        getattr(dcn_d2.ops, operator)(**good(operator) | {argument: (HUGE, 1)})


def test_huge_group_size_is_refused() -> None:
    with pytest.raises(RuntimeError, match="group_size must be at most 2147483647, got 4294967296"):
        dcn_d2.ops.deform_psroi_pool(**good("deform_psroi_pool") | {"group_size": HUGE})
