# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""OpenVINO computes what the operators of dcn_d2 compute."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcn_d2.export.openvino.operators import extensions
from dcn_d2.export.openvino.package import get_core, import_openvino, without_telemetry
from dcn_d2.ops import batched_nms, deform_conv2d
from dcn_d2.ops.portable import portable_operators

pytest.importorskip("openvino", reason="openvino is not installed")

# in_channels, out_channels, conv groups, deform groups.
CHANNELS = [
    (4, 6, 1, 1),
    (8, 6, 2, 1),
    (8, 6, 1, 2),
    (8, 8, 2, 2),
    (8, 8, 4, 2),
    (8, 8, 2, 4),
    (6, 6, 3, 2),
    (8, 8, 8, 1),
]
# kernel, stride, padding, dilation.
GEOMETRIES: list[tuple[Any, ...]] = [
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 2), (2, 1), (0, 2), (1, 2)),
    ((2, 4), (2, 2), (2, 1), (3, 2)),
    ((1, 1), (1, 1), (0, 0), (1, 1)),
]


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


def run(function: Any, *inputs: Tensor, free: bool = True) -> Tensor:
    """Runs a function in OpenVINO, with free sizes of the inputs or with fixed ones."""
    ov = import_openvino()
    with portable_operators(), warnings.catch_warnings(), without_telemetry():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        traced = torch.jit.trace(Function(function), inputs, check_trace=False)
        shapes = [ov.PartialShape([-1] * each.dim() if free else list(each.shape)) for each in inputs]
        if free and inputs[0].dim() == 3:
            shapes[0][2] = ov.Dimension(4)
        model = ov.convert_model(traced, input=shapes, extension=extensions())
    compiled = get_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.as_tensor(compiled([each.numpy() for each in inputs])[0])


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_deform_conv2d(channels: tuple[int, ...], has_mask: bool, has_bias: bool) -> None:
    in_channels, out_channels, groups, deform_groups = channels
    generator = torch.Generator().manual_seed(0)
    for kernel, stride, padding, dilation in GEOMETRIES:
        taps, size = kernel[0] * kernel[1], (13, 17)
        out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, kernel, stride, padding, dilation)]
        input = torch.randn(2, in_channels, *size, generator=generator)
        offset = torch.randn(2, 2 * deform_groups * taps, *out, generator=generator) * 3  # some leave the image
        mask = torch.rand(2, deform_groups * taps, *out, generator=generator)
        weight = torch.randn(out_channels, in_channels // groups, *kernel, generator=generator)
        bias = torch.randn(out_channels, generator=generator) if has_bias else None

        def convolve(input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
            return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)

        tensors = (input, offset, mask) if has_mask else (input, offset)
        expected = convolve(*tensors)
        torch.testing.assert_close(
            run(convolve, *tensors), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
        )


def _boxes(batch: int, number: int, step: float = 0.0) -> Tensor:
    corners = torch.rand(batch, number, 2, 2, generator=torch.Generator().manual_seed(number)) * 20
    if step:
        corners = (corners / step).round() * step
    return torch.cat([corners.amin(dim=2), corners.amax(dim=2)], dim=-1)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("step", [0.0, 2.0, 5.0], ids=lambda step: f"step_{step}")
@pytest.mark.parametrize(("batch", "number"), [(1, 1), (1, 7), (2, 300), (5, 40)])
def test_batched_nms(batch: int, number: int, step: float, free: bool) -> None:
    """With a step, many boxes overlap by exactly the threshold, and none of these is suppressed."""
    boxes = _boxes(batch, number, step)
    scores = torch.rand(batch, number, generator=torch.Generator().manual_seed(1))
    few, row, none = scores.clone(), scores.clone(), torch.full_like(scores, -torch.inf)
    few[scores < 0.8] = -torch.inf
    row[0] = -torch.inf
    for case in (scores, (scores * 4).round(), scores - 100, few, row, none):
        found = run(lambda boxes, scores: batched_nms(boxes, scores, 0.5), boxes, case, free=free)
        assert torch.equal(found, batched_nms(boxes, case, 0.5))


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.7, 1.0])
def test_batched_nms_suppresses_above_its_threshold(threshold: float) -> None:
    boxes, scores = _boxes(2, 100, 2.0), torch.rand(2, 100, generator=torch.Generator().manual_seed(1))
    found = run(lambda boxes, scores: batched_nms(boxes, scores, threshold), boxes, scores)
    assert torch.equal(found, batched_nms(boxes, scores, threshold))
