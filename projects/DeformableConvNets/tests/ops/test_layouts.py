# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Results do not depend on how operands lie in memory, and keep the memory format of the input."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from .checks import TOLERANCE, assert_same, assert_same_bits, compiled, oracle, output_gradient, results
from .layouts import off_by_one_element, turned_columns
from .paths import CPU, CUDA, DEVICES, FORMATS, TILED, Case, number_of_threads, parametrize_cases
from .samples import CONV_SAMPLES, POOLINGS, ConvSample, RoiSample, operands_of

KEPT = ConvSample("format", channels=8, groups=2, deform_groups=2)


@parametrize_cases(
    Case(operator, path, sample, dtype)
    for path in (CPU, CUDA)
    for operator, sample, dtype in (
        ("deform_conv2d", KEPT, torch.float32),
        ("deform_conv2d", KEPT, torch.bfloat16),
        *((operator, RoiSample("format"), torch.float32) for operator in POOLINGS),
    )
)
def test_memory_format_is_kept(case: Case) -> None:
    operands = case.operands()
    expected = results(case.operator, case.sample, operands)
    names = {"input"} if case.operator in POOLINGS else {n for n, t in operands.items() if t.dim() == 4}
    last = operands | {name: operands[name].contiguous(memory_format=torch.channels_last) for name in names}
    actual = results(case.operator, case.sample, last)
    assert expected["output"].is_contiguous() and expected["input"].is_contiguous()
    for name in ("input",) if case.operator in POOLINGS else ("output", "input", "weight"):
        assert actual[name].is_contiguous(memory_format=torch.channels_last)
    assert_same(actual, expected, 1e-6 if case.operator in POOLINGS else TOLERANCE[case.dtype])


def test_non_contiguous_operands() -> None:
    sample = ConvSample("views")
    operands = sample.tensors()
    padded = {name: torch.stack([t, -t], -1)[..., 0] for name, t in operands.items()}
    assert not any(t.is_contiguous() for t in padded.values())
    outputs = [compiled("deform_conv2d", sample, **each) for each in (operands, padded)]
    assert torch.equal(*outputs)


def check_as_given(sample: ConvSample, operands: dict[str, Tensor], grad: Tensor) -> None:
    """Compares with the reference, without a copy in which the operands' strides and places would be others."""
    leaves = {name: t.detach().requires_grad_() for name, t in operands.items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in operands.items()}
    output = compiled("deform_conv2d", sample, **leaves)
    expected = oracle("deform_conv2d", sample, **exact)
    found = torch.autograd.grad(output, list(leaves.values()), grad)
    wanted = torch.autograd.grad(expected, list(exact.values()), grad.double())
    actual = {"output": output.detach()} | dict(zip(leaves, found))
    assert_same(actual, {"output": expected.detach()} | dict(zip(leaves, wanted)), TOLERANCE[grad.dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("name", ["input", "offset", "weight", "bias", "mask", "grad"])
def test_alignment_to_an_element(
    name: str, memory_format: torch.memory_format, dtype: torch.dtype, device: str
) -> None:
    """With as many channels as CUDA reads 16 bytes of at a time, where memory is aligned to that."""
    sample = ConvSample("shifted", channels=16, out_channels=24, deform_groups=2)
    operands = sample.tensors(dtype, device)
    grad = output_gradient(torch.empty(2, 24, *sample.out_size, dtype=dtype, device=device))
    tensors = {
        key: t.contiguous(memory_format=memory_format) if t.dim() == 4 else t
        for key, t in (operands | {"grad": grad}).items()
    }
    tensors[name] = off_by_one_element(tensors[name])
    check_as_given(sample, tensors, tensors.pop("grad"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_one_column_of_any_stride(dtype: torch.dtype, device: str) -> None:
    sample = ConvSample("column", channels=16, out_channels=8, size=(9, 1), kernel=(3, 1), padding=(1, 0))
    operands = sample.tensors(dtype, device)
    grad = output_gradient(torch.empty(2, 8, 9, 1, dtype=dtype, device=device))
    turned = {name: turned_columns(t) if t.dim() == 4 else t for name, t in operands.items()}
    check_as_given(sample, turned, turned_columns(grad))


def test_expanded_output_gradient() -> None:
    operands = {name: t.requires_grad_() for name, t in CONV_SAMPLES[1].tensors().items()}
    output = compiled("deform_conv2d", CONV_SAMPLES[1], **operands)
    summed = torch.autograd.grad(output.sum(), operands["input"], retain_graph=True)[0]  # gradient of strides 0
    dense = torch.autograd.grad(output, operands["input"], torch.ones_like(output))[0]
    assert torch.equal(summed, dense)


def test_parts_of_a_larger_tensor() -> None:
    sample = CONV_SAMPLES[1]
    operands = operands_of("modulated_deform_conv2d", sample)
    expected = compiled("modulated_deform_conv2d", sample, **operands)
    larger = torch.cat([operands["offset_and_mask"]] * 2, dim=1)
    for memory_format in FORMATS:
        part = larger.contiguous(memory_format=memory_format)[:, 27:]
        assert not part.is_contiguous(memory_format=memory_format)
        found = compiled("modulated_deform_conv2d", sample, **operands | {"offset_and_mask": part})
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_weight_in_channels_last(threads: int) -> None:
    case = Case("deform_conv2d", TILED, ConvSample("weight", channels=40, out_channels=24, batch=3), torch.bfloat16)
    operands = case.operands()
    other = dict(operands, weight=operands["weight"].contiguous(memory_format=torch.channels_last))
    with number_of_threads(threads):
        expected, actual = (results("deform_conv2d", case.sample, each) for each in (operands, other))
    assert_same_bits(expected, actual)
    assert actual["weight"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_many_channels_and_tiles(groups: int, memory_format: torch.memory_format) -> None:
    """With so many channels the backward pass goes over the image several times."""
    sample = ConvSample("many", batch=1, channels=1040, out_channels=6, size=(18, 19), kernel=(2, 1))
    Case("deform_conv2d", CPU, dataclasses.replace(sample, groups=groups), memory_format=memory_format).check()
