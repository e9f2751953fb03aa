# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Gradients by finite differences, and each gradient alone, for every operator and path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .checks import compiled, output_gradient, results
from .paths import ALL_SAMPLES, CPU, CUDA, GROUPED, TILED, Case, parametrize_cases
from .samples import CONV_SAMPLES, GROUPED_SAMPLES, MODULATED_SAMPLES, ConvSample, RoiSample

MODULATED = [sample for sample in MODULATED_SAMPLES if sample.name in ("modulated", "groups_across_deform_groups")]
SAMPLES = ALL_SAMPLES | {"modulated_deform_conv2d": [*MODULATED, MODULATED_SAMPLES[-1]]}


@pytest.mark.unsanitized
@parametrize_cases(
    [
        *(Case(operator, path, sample) for path in (CPU, CUDA) for operator in SAMPLES for sample in SAMPLES[operator]),
        *(Case("deform_conv2d", GROUPED, sample) for sample in GROUPED_SAMPLES),
    ]
)
def test_gradcheck(case: Case) -> None:
    operands = case.operands()
    if isinstance(case.sample, ConvSample) and case.sample.spread == 0:
        operands["offset"] += 0.3  # off the kinks of the lattice
    leaves = {n: t.requires_grad_() for n, t in operands.items() if isinstance(t, Tensor) and n != "rois"}

    def function(*tensors: Tensor) -> Tensor:
        return compiled(case.operator, case.sample, **(operands | dict(zip(leaves, tensors))))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), nondet_tol=1e-9, fast_mode=True)


def conv_sample(name: str) -> ConvSample:
    return next(sample for sample in CONV_SAMPLES if sample.name == name)


ALONE = [
    Case("deform_conv2d", CPU, conv_sample("deform_groups")),
    Case("modulated_deform_conv2d", CPU, conv_sample("deform_groups")),
    Case("deform_roi_pool", CPU, RoiSample("modulated")),
    Case("deform_psroi_pool", CPU, RoiSample("modulated")),
    Case("deform_conv2d", GROUPED, GROUPED_SAMPLES[2]),
    Case("deform_conv2d", TILED, ConvSample("alone", channels=40, out_channels=24), torch.bfloat16),
    # Channels that do not fill a vector: the last ones were once summed in another order if one gradient was wanted.
    *(
        Case(operator, CPU, ConvSample(f"{channels}_channels", channels=channels, out_channels=4), dtype)
        for operator in ("deform_conv2d", "modulated_deform_conv2d")
        for channels in (3, 8, 40)
        for dtype in (torch.float32, torch.float64)
    ),
]


@pytest.mark.parametrize(
    ("case", "needed"),
    [pytest.param(case, name, id=f"{case}-{name}") for case in ALONE for name in case.operands() if name != "rois"],
)
def test_one_gradient_alone(case: Case, needed: str) -> None:
    operands = case.operands()
    everything = results(case.operator, case.sample, operands)
    operands[needed].requires_grad_()
    output = compiled(case.operator, case.sample, **operands)
    output.backward(output_gradient(output))
    # A weight's gradient alone is computed in larger tiles, so its positions are summed in other groups.
    larger_tiles = needed == "weight" and case.dtype != torch.bfloat16
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[case.dtype] if larger_tiles else 0
    torch.testing.assert_close(operands[needed].grad, everything[needed], rtol=0, atol=tolerance)
    assert all(t.grad is None for name, t in operands.items() if isinstance(t, Tensor) and name != needed)
