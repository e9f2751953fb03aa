# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Compiled kernels, fake kernels and the reference refuse the same operands with the same words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dcn_d2.ops  # noqa: F401  registers the operators

CONV: dict[str, Any] = {
    "input": torch.zeros(2, 4, 5, 6),
    "offset": torch.zeros(2, 18, 5, 6),
    "weight": torch.zeros(4, 4, 3, 3),
    "padding": [1, 1],
}
MODULATED: dict[str, Any] = {"offset_and_mask": torch.zeros(2, 27, 5, 6)} | {
    k: v for k, v in CONV.items() if k != "offset"
}
ROI: dict[str, Any] = {
    "input": torch.zeros(2, 4, 5, 6),
    "rois": torch.zeros(3, 5),
    "offset": None,
    "output_size": [2, 2],
}

GOOD = {"deform_conv2d": CONV, "modulated_deform_conv2d": MODULATED, "deform_roi_pool": ROI, "deform_psroi_pool": ROI}


def conv_map(channels: int) -> Tensor:
    return torch.zeros(2, channels, 5, 6)


# Operator, the operand that is changed, and what is said of it.
REFUSED: list[tuple[str, str, Any, str]] = [
    ("deform_conv2d", "offset", conv_map(17), "offset has 17 channels, but needs a multiple of 2 * 3 * 3 = 18"),
    (
        "modulated_deform_conv2d",
        "offset_and_mask",
        conv_map(26),
        "offset_and_mask has 26 channels, but needs a multiple of 3 * 3 * 3 = 27",
    ),
    ("deform_conv2d", "input", conv_map(5), "input has 5 channels, but needs a multiple of weight's 4"),
    (
        "deform_conv2d",
        "weight",
        torch.zeros(3, 2, 3, 3),
        "weight has 3 output channels, but needs a multiple of the 2 groups",
    ),
    ("deform_conv2d", "offset", conv_map(54), "input has 4 channels, but needs a multiple of offset's 3 groups"),
    ("deform_conv2d", "stride", [0, 1], "stride must be two numbers of at least 1, got [0, 1]"),
    ("deform_conv2d", "weight", torch.zeros(4, 4, 0, 3), "weight has an empty kernel, 0 x 3"),
    ("deform_conv2d", "bias", torch.zeros(3), "bias must have shape [4], got [3]"),
    ("deform_roi_pool", "output_size", [2, 0], "output_size must be two numbers of at least 1, got [2, 0]"),
    ("deform_roi_pool", "sampling_ratio", -1, "sampling_ratio must be at least 0, got -1"),
    ("deform_psroi_pool", "part_size", [0, 2], "part_size must be two numbers of at least 1, got [0, 2]"),
    ("deform_psroi_pool", "group_size", 0, "group_size must be at least 1, got 0"),
    ("deform_psroi_pool", "group_size", 3, "input has 4 channels, but needs a multiple of group_size^2 = 9"),
    ("deform_psroi_pool", "sample_per_part", 0, "sample_per_part must be at least 1, got 0"),
    (
        "deform_psroi_pool",
        "offset",
        torch.zeros(3, 6, 2, 2),
        "offset has 6 channels, but needs 2 * classes, where classes divides the 4 output channels",
    ),
]
DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]
DTYPES += [torch.complex64, torch.complex128, torch.float8_e4m3fn]
REFUSED += [
    (
        "deform_conv2d",
        "input",
        conv_map(4).to(dtype),
        f"input must be float64, float32, float16 or bfloat16, got {dtype}",
    )
    for dtype in DTYPES
]
REFUSED += [
    ("deform_roi_pool", "rois", ROI["rois"].to(dtype), f"rois has dtype {dtype}, but input has torch.float32")
    for dtype in (torch.int32, torch.float64)
]
KEYS = {
    "compiled": torch._C.DispatchKey.CPU,
    "fake": torch._C.DispatchKey.Meta,
    "reference": torch._C.DispatchKey.CompositeExplicitAutograd,
}


@pytest.mark.filterwarnings("ignore:dcn_d2.* runs in Python")
@pytest.mark.parametrize("path", KEYS)
@pytest.mark.parametrize(("name", "operand", "bad", "message"), REFUSED, ids=[case[-1] for case in REFUSED])
def test_every_path_says_the_same(name: str, operand: str, bad: Any, message: str, path: str) -> None:
    operator = getattr(torch.ops.dcn_d2, name).default
    if path == "compiled" and not torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CPU"):
        pytest.skip("there are no compiled kernels")
    values = GOOD[name] | {operand: bad}
    operands = [values.get(argument.name, argument.default_value) for argument in operator._schema.arguments]
    if path == "fake":
        operands = [value.to("meta") if isinstance(value, Tensor) else value for value in operands]
    with pytest.raises(RuntimeError) as caught:
        operator._op_dk(KEYS[path], *operands)
    assert str(caught.value) == f"{name}: {message}"
