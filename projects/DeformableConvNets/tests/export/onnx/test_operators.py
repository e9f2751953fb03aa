# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Operators and layers as graphs of one node in ONNX Runtime, in all variants."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dcn_d2.export.onnx.writer import translate
from dcn_d2.layers import DeformConvPack, ModulatedDeformConvPack
from dcn_d2.ops import batched_nms, deform_conv2d

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

VARIANTS: list[dict[str, Any]] = [
    {},
    {"mask": True, "bias": True, "stride": (2, 1), "padding": (1, 2), "dilation": (2, 1)},
    {"groups": 2, "deform_groups": 4, "bias": True, "kernel": (2, 3), "padding": (0, 1)},
    {"groups": 4, "deform_groups": 2, "mask": True, "stride": (1, 3), "kernel": (1, 1)},
]


class Convolution(nn.Module):
    """A deformable convolution without parameters of its own, so that its inputs are those of the graph."""

    def __init__(self, weight: Tensor, bias: Tensor | None, **arguments: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.arguments = arguments

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return deform_conv2d(x, offset, self.weight, self.bias, mask=mask, **self.arguments)  # type: ignore[arg-type]


def run(model: Any, inputs: dict[str, Tensor]) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


def make_inputs(variant: dict[str, Any], batch: int, height: int, width: int) -> tuple[nn.Module, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(batch)
    kernel, groups = variant.get("kernel", (3, 3)), variant.get("groups", 1)
    arguments = {
        "stride": variant.get("stride", (1, 1)),
        "padding": variant.get("padding", (0, 0)),
        "dilation": variant.get("dilation", (1, 1)),
    }
    weight = torch.randn(8, 8 // groups, *kernel, generator=torch.Generator().manual_seed(0))
    module = Convolution(weight, torch.arange(8.0) if variant.get("bias") else None, **arguments)
    plain = nn.Conv2d(8, 1, kernel, *arguments.values())  # type: ignore[arg-type]
    out = plain(torch.zeros(1, 8, height, width)).shape[2:]
    positions = variant.get("deform_groups", 1) * kernel[0] * kernel[1]
    inputs = {
        "x": torch.randn(batch, 8, height, width, generator=generator),
        "offset": 2 * torch.randn(batch, 2 * positions, *out, generator=generator),
    }
    if variant.get("mask"):
        inputs["mask"] = torch.rand(batch, positions, *out, generator=generator)
    return module.eval(), inputs


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant) or "plain")
def test_a_convolution_is_one_node_with_the_same_result(variant: dict[str, Any]) -> None:
    module, inputs = make_inputs(variant, 2, 9, 11)
    batch = torch.export.Dim("batch", min=1, max=64)
    model = translate(module, tuple(inputs.values()), list(inputs), ["out"], tuple({0: batch} for _ in inputs))
    nodes = Counter(node.op_type for node in model.graph.node)
    assert nodes == {"DeformConv": 1}
    for number in (2, 1, 5):
        _, others = make_inputs(variant, number, 9, 11)
        (out,) = run(model, others)
        torch.testing.assert_close(torch.from_numpy(out), module(*others.values()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [DeformConvPack, ModulatedDeformConvPack])
def test_layers_take_maps_of_any_size(layer: Any) -> None:
    torch.manual_seed(0)
    module = layer(4, 6, 3, padding=1, deformable_groups=2).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    sizes = {axis: torch.export.Dim(name, min=2, max=512) for axis, name in enumerate("nchw") if axis != 1}
    model = translate(module, (torch.randn(2, 4, 7, 9),), ["x"], ["out"], (sizes,))
    for shape in [(2, 4, 7, 9), (1, 4, 16, 5)]:
        x = torch.randn(shape)
        (out,) = run(model, {"x": x})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(out), module(x), rtol=1e-4, atol=1e-4)


class Suppression(nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
        return batched_nms(boxes, scores, 0.5)


@pytest.mark.parametrize("free_boxes", [False, True])
def test_non_maximum_suppression(free_boxes: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(4, 50, 2, generator=generator) * 20
    boxes = torch.cat([corners, corners + 1 + 10 * torch.rand(4, 50, 2, generator=generator)], -1)
    scores = torch.rand(4, 50, generator=generator)
    scores[1] = float("-inf")  # nothing to keep
    scores[2, 10:] = float("-inf")
    free = {0: torch.export.Dim("rows", min=1, max=64)}
    if free_boxes:
        free[1] = torch.export.Dim("number", min=1, max=64)
    model = translate(Suppression(), (boxes, scores), ["boxes", "scores"], ["kept"], (free, free))
    for rows in (slice(0, 4), slice(1, 2)):
        (kept,) = run(model, {"boxes": boxes[rows], "scores": scores[rows]})
        expected = batched_nms(boxes[rows], scores[rows], 0.5)
        assert kept.dtype == np.bool_ and np.array_equal(kept, expected.numpy())
        assert rows != slice(0, 4) or 0 < expected[0].sum() < 50


def test_non_maximum_suppression_of_no_boxes() -> None:
    free = {0: torch.export.Dim("rows", min=1, max=64), 1: torch.export.Dim("number", min=0, max=64)}
    inputs = (torch.rand(2, 3, 4), torch.rand(2, 3))
    model = translate(Suppression(), inputs, ["boxes", "scores"], ["kept"], (free, free))
    (kept,) = run(model, {"boxes": torch.zeros(2, 0, 4), "scores": torch.zeros(2, 0)})
    assert kept.shape == (2, 0)
