# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The operators as torch's tools see them: opcheck, torch.compile, torch.export. test_strides.py has Inductor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcn_d2.layers import ModulatedDeformConvPack
from dcn_d2.ops import deform_conv2d

from .layouts import arguments_of
from .paths import CPU, CUDA, FORMATS, Case, parametrize_cases
from .samples import CONV_SAMPLES, EMPTY_BATCH, MODULATED_SAMPLES, PSROI_SAMPLES, ROI_SAMPLES

CONVOLUTIONS = {
    "deform_conv2d": [CONV_SAMPLES[2], CONV_SAMPLES[4], EMPTY_BATCH],
    "modulated_deform_conv2d": [MODULATED_SAMPLES[0], MODULATED_SAMPLES[-1], EMPTY_BATCH],
}
POOLINGS = {
    "deform_roi_pool": [ROI_SAMPLES[index] for index in (0, 2, -1)],
    "deform_psroi_pool": [PSROI_SAMPLES[index] for index in (0, 2, -1)],
}


@pytest.mark.unsanitized
@parametrize_cases(
    Case(operator, path, sample, torch.float64, memory_format)
    for samples, paths in ((CONVOLUTIONS, (CPU, CUDA)), (POOLINGS, (CPU,)))
    for path in paths
    for operator in samples
    for sample in samples[operator]
    for memory_format in FORMATS
)
def test_opcheck(case: Case) -> None:
    operands = case.operands()
    for name in {"input", "weight", "offset_and_mask"} & operands.keys():
        operands[name] = operands[name].contiguous(memory_format=case.memory_format)
    for name, tensor in operands.items():
        if isinstance(tensor, Tensor) and name != "rois":
            tensor.requires_grad_()
    arguments = arguments_of(case.operator, operands | case.sample.arguments)
    torch.library.opcheck(getattr(torch.ops.dcn_d2, case.operator).default, tuple(arguments))


class Layer(nn.Module):
    """deform_conv2d after a branch of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Conv2d(4, 27, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.offset(x).split([18, 9], 1)
        return deform_conv2d(x, offset, self.weight, padding=1, mask=mask.sigmoid())


def pack() -> nn.Module:
    layer = ModulatedDeformConvPack(4, 6, 3, padding=1)
    nn.init.normal_(layer.conv_offset.weight, std=0.3)
    return layer


@pytest.mark.slow
@pytest.mark.unsanitized
@pytest.mark.parametrize("make", [Layer, pack], ids=["deform_conv2d", "modulated_deform_conv2d"])
def test_compiles_and_exports_with_dynamic_shapes(make: Any) -> None:
    torch.manual_seed(0)
    layer, images = make(), [torch.randn(2, 4, 12, 17), torch.randn(3, 4, 9, 22)]
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
    program = torch.export.export(layer, (images[0],), dynamic_shapes=({0: batch, 2: height, 3: width},))
    called = {str(node.target) for node in program.graph.nodes}
    assert "dcn_d2.deform_conv2d.default" in called  # which exporters to other runtimes know
    assert "dcn_d2.modulated_deform_conv2d.default" not in called
    traced = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for image in images:
        expected = layer(image)
        torch.testing.assert_close(program.module()(image), expected)
        actual = traced(image)
        torch.testing.assert_close(actual, expected)
        for a, e in zip(*(torch.autograd.grad(out.sum(), list(layer.parameters())) for out in (actual, expected))):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
