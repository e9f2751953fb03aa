# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""How the operators' tests compare: what is called, what it is compared with, and how far the two may be apart."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dcn_d2.ops
from dcn_d2.ops import reference, split_offset_and_mask

from .samples import Sample

# Largest error over the largest value.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# Norm of the error over the norm of the result, where positions are such that no rounding moves them across a pixel.
NORM_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def compiled(operator: str, sample: Sample, **operands: Any) -> Tensor:
    """Calls the operator."""
    return getattr(dcn_d2.ops, operator)(**operands, **sample.arguments)


def oracle(operator: str, sample: Sample, **operands: Any) -> Tensor:
    """Calls the reference in its place."""
    if operator == "modulated_deform_conv2d":
        offset, mask = split_offset_and_mask(operands.pop("offset_and_mask"))
        operands |= {"offset": offset, "mask": mask}
        operator = "deform_conv2d"
    if operator == "deform_conv2d":
        operands = {"bias": None, "mask": None} | operands
    return getattr(reference, operator)(**operands, **sample.arguments)


def in_float64(operands: dict[str, Any]) -> dict[str, Any]:
    """The same values in float64: the difference between results is then the operator's own."""
    return {name: t.double() if isinstance(t, Tensor) else t for name, t in operands.items()}


def output_gradient(output: Tensor, seed: int = 1) -> Tensor:
    """A fixed random gradient of an output."""
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return grad.to(output)


def gradients(
    function: Callable[..., Tensor], operands: dict[str, Any], rounded: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Output, and the gradient of every floating operand but `rois`, for a fixed random output gradient.

    With `rounded` the output gradient has values that this dtype holds exactly.
    """
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_(name != "rois")
        if isinstance(t, Tensor)
        else t
        for name, t in operands.items()
    }
    output = function(**leaves)
    wanted = {name: t for name, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad}
    grad = output_gradient(output.double()).to(rounded or output.dtype).to(output)
    found = torch.autograd.grad(output, list(wanted.values()), grad, allow_unused=True, materialize_grads=True)
    return {"output": output.detach()} | dict(zip(wanted, found))


def results(operator: str, sample: Sample, operands: dict[str, Any]) -> dict[str, Tensor]:
    """Output and gradients of the operator."""
    return gradients(functools.partial(compiled, operator, sample), operands)


def expected_results(operator: str, sample: Sample, operands: dict[str, Any]) -> dict[str, Tensor]:
    """Output and gradients of the reference, in float64."""
    return gradients(functools.partial(oracle, operator, sample), in_float64(operands))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compares output and gradients by name, relative to the largest expected value of each."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(value.abs().max()) if value.numel() else 0.0, 1.0)
        torch.testing.assert_close(
            actual[name].to(value), value, rtol=0, atol=tolerance * scale, msg=lambda text: f"{name}: {text}"
        )


def assert_norms_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compares output and gradients by name: the norm of the error with the norm of the result."""
    assert actual.keys() == expected.keys()
    errors = {name: float((actual[name].double() - value.double()).norm()) for name, value in expected.items()}
    norms = {name: float(value.double().norm()) for name, value in expected.items()}
    print({name: error / (norms[name] or 1.0) for name, error in errors.items()})
    assert all(error <= tolerance * norms[name] for name, error in errors.items()), (errors, norms)


def assert_same_bits(first: dict[str, Tensor], *others: dict[str, Tensor]) -> None:
    """Compares output and gradients by name: not a bit may differ."""
    for other in others:
        assert first.keys() == other.keys()
        different = [name for name in first if not torch.equal(first[name], other[name])]
        assert not different, f"other bits in {different}"


def assert_equals_reference(
    operator: str,
    sample: Sample,
    operands: dict[str, Any],
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
    by_norm: bool = False,
) -> None:
    """Compares output and all gradients with the reference's for the same operands: dtypes, memory formats, values."""
    dtype = operands["input"].dtype
    exact = in_float64(operands)
    names = ("input", "offset_and_mask", "weight") if operator == "modulated_deform_conv2d" else ("input",)
    operands = operands | {name: operands[name].contiguous(memory_format=memory_format) for name in names}
    rounded = dtype if by_norm else None
    actual = gradients(functools.partial(compiled, operator, sample), operands, rounded)
    expected = gradients(functools.partial(oracle, operator, sample), exact, rounded)
    assert all(t.dtype == dtype for t in actual.values())
    for name in ("input", "offset_and_mask"):
        assert name not in actual or actual[name].is_contiguous(memory_format=memory_format), name
    if "roi" not in operator and not operands["input"].is_contiguous():
        assert actual["output"].is_contiguous(memory_format=torch.channels_last)
    if by_norm:
        assert_norms_close(actual, expected, NORM_TOLERANCE[dtype])
    else:
        assert_same(actual, expected, TOLERANCE[dtype])
