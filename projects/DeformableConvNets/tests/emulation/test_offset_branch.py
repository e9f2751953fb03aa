# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Runs modulated_deform_conv2d's CUDA kernels on the CPU: see emulate.h for what that proves and what it does not."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from dcn_d2.ops import reference, split_offset_and_mask
from tests.ops.layouts import turned_columns
from tests.ops.samples import CONV_SAMPLES, EMPTY_BATCH, ConvSample, by_name

from .emulator import GREEDY_WARP, ROUND_ROBIN, SANITIZED, emulate
from .test_cuda_kernels import conv_values
from .test_tensor_cores import ARITHMETIC

# Sizes for kernels with tensor cores, without them, and with tensor cores in the forward pass only.
SAMPLES = [
    *(sample for sample in CONV_SAMPLES if sample.mask and sample.name != "many_positions"),
    ConvSample("several_tiles", channels=24, out_channels=72, size=(9, 15)),
    ConvSample("tensor_cores_forward_only", channels=16, out_channels=7, size=(6, 7), stride=(2, 1)),
    ConvSample("groups", channels=64, out_channels=64, groups=8, deform_groups=2, size=(5, 6)),
    ConvSample("many_taps", channels=16, out_channels=8, kernel=(4, 5), padding=(2, 2), size=(7, 7)),
]
ALL_ARITHMETIC = ARITHMETIC | {"float64": (torch.float64, False, 1e-10)}
FORMATS = NCHW, NHWC = [torch.contiguous_format, torch.channels_last]
# How the branch's output is read and its gradient written does not depend on how products are formed.
RUNS = [
    *((ROUND_ROBIN, arithmetic, each) for arithmetic in ("bfloat16", "float64") for each in FORMATS),
    (ROUND_ROBIN, "float32", NHWC),
    (ROUND_ROBIN, "tf32", NCHW),
    (GREEDY_WARP, "float16", NHWC),
]


def branch_values(sample: ConvSample, dtype: torch.dtype, memory_format: torch.memory_format) -> dict[str, Any]:
    """Operands with the output of an offset branch, whose last third are logits, some of them large."""
    values = conv_values(sample, dtype)
    logits = (8 * values.pop("mask").double().logit()).to(dtype)
    values["offset_and_mask"] = torch.cat([values.pop("offset"), logits], dim=1)
    for name in ("input", "offset_and_mask"):
        values[name] = values[name].contiguous(memory_format=memory_format)
    return values


def expected_of(values: dict[str, Any], grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients in float64."""
    names = ("input", "offset_and_mask", "weight")
    fixed = {name: t.double() if isinstance(t, Tensor) else t for name, t in values.items() if name not in names}

    def forward(input: Tensor, offset_and_mask: Tensor, weight: Tensor) -> Tensor:
        offset, mask = split_offset_and_mask(offset_and_mask)
        return reference.deform_conv2d(input, offset, weight, mask=mask, **fixed)

    leaves = [values[name].double() for name in names]
    found = reference.gradients(forward, leaves, grad.double(), [True] * 3)
    return {"output": forward(*leaves)} | dict(zip(names, found))


@pytest.mark.parametrize(("schedule", "arithmetic", "memory_format"), RUNS[:1] if SANITIZED in os.environ else RUNS)
@pytest.mark.parametrize("sample", SAMPLES, ids=by_name)
def test_modulated_deform_conv2d(
    sample: ConvSample, schedule: int, arithmetic: str, memory_format: torch.memory_format, configure: Any
) -> None:
    configure(schedule)
    dtype, allow_tf32, tolerance = ALL_ARITHMETIC[arithmetic]
    values = branch_values(sample, dtype, memory_format)
    found = emulate("modulated_deform_conv2d", values | {"allow_tf32": allow_tf32})
    gradient = found["offset_and_mask"]
    assert gradient.shape == values["offset_and_mask"].shape
    assert gradient.is_contiguous(memory_format=memory_format)
    thirds = {"output": 1, "input": 1, "weight": 1, "offset_and_mask": 3}
    for name, value in expected_of(values, found["grad"]).items():
        assert found[name].dtype == dtype
        # Each third of the branch's gradient by its own largest value: those by offsets and by logits differ in size.
        for actual, third in zip(found[name].chunk(thirds[name], 1), value.chunk(thirds[name], 1)):
            error = (actual.double() - third).abs().max() / third.abs().max().clamp(min=1e-3)
            assert error < tolerance, name


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float64"])
def test_any_strides(arithmetic: str, configure: Any) -> None:
    """The branch's output as a part of a larger tensor, every second value of one, and turned."""
    configure(ROUND_ROBIN)
    dtype, allow_tf32, _ = ALL_ARITHMETIC[arithmetic]
    values = branch_values(ConvSample("strides", channels=8, out_channels=8, size=(5, 9)), dtype, NCHW)
    values["allow_tf32"] = allow_tf32
    branch = values["offset_and_mask"]
    expected = emulate("modulated_deform_conv2d", values)
    larger = torch.cat([branch, branch], 1)
    for strided in (
        larger[:, branch.shape[1] :],
        larger.contiguous(memory_format=torch.channels_last)[:, branch.shape[1] :],
        torch.stack([branch, branch], -1)[..., 1],
        branch.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert not strided.is_contiguous() and torch.equal(strided.nan_to_num(), branch.nan_to_num())
        found = emulate("modulated_deform_conv2d", values | {"offset_and_mask": strided})
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float64"])
def test_one_column_of_any_stride(arithmetic: str, configure: Any) -> None:
    """Where the last dimension has one element, its stride means nothing, and `contiguous` leaves it as it is."""
    configure(ROUND_ROBIN)
    dtype, allow_tf32, _ = ALL_ARITHMETIC[arithmetic]
    sample = ConvSample("column", channels=8, out_channels=8, size=(7, 1), kernel=(3, 1), padding=(1, 0))
    values = branch_values(sample, dtype, NCHW) | {"allow_tf32": allow_tf32}
    turned = {name: turned_columns(values[name]) for name in ("input", "offset_and_mask", "weight")}
    expected, found = (emulate("modulated_deform_conv2d", each) for each in (values, values | turned))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("needed", ["need_input", "need_offset", "need_weight"])
def test_computes_what_is_needed(needed: str, configure: Any) -> None:
    configure(ROUND_ROBIN)
    need = {name: name == needed for name in ("need_input", "need_offset", "need_weight")}
    for sample in (SAMPLES[1], SAMPLES[-1]):
        values = branch_values(sample, torch.float32, NHWC)
        expected = emulate("modulated_deform_conv2d", values)
        found = emulate("modulated_deform_conv2d", values, **need)
        for name, wanted in zip(("input", "offset_and_mask", "weight"), need.values()):
            assert torch.equal(found[name], expected[name]) if wanted else found[name].numel() == 0


def test_an_empty_batch_gives_zeros(configure: Any) -> None:
    configure(ROUND_ROBIN)
    values = branch_values(EMPTY_BATCH, torch.float32, NCHW)
    found = emulate("modulated_deform_conv2d", values)
    for name in ("input", "offset_and_mask", "weight"):
        assert found[name].shape == values[name].shape and not found[name].any()


def test_operands_are_checked(configure: Any) -> None:
    configure(ROUND_ROBIN)
    values = branch_values(SAMPLES[0], torch.float32, NCHW)
    for change, message in (
        (values["offset_and_mask"][:, 1:], "offset_and_mask has 26 channels"),
        (values["offset_and_mask"][..., 1:], "modulated_deform_conv2d: offset_and_mask must have shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            emulate("modulated_deform_conv2d", values | {"offset_and_mask": change})
    with pytest.raises(RuntimeError, match="modulated_deform_conv2d_backward: grad must have"):
        emulate("modulated_deform_conv2d", values | {"grad": torch.zeros(2, 6, 7, 8)})
