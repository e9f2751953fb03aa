# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable RoI pooling on the levels of an FPN, in other runtimes: one graph for all sizes and numbers of RoIs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dcn_d2 import layers
from dcn_d2.modeling import DCNROIPooler, pool_rois
from dcn_d2.ops.portable import portable_operators

CHANNELS = 6
NAMES = ["p4", "p5", "rois"]  # two levels: converting four takes twice the time
POOLERS = ["DeformRoIPool", "ModulatedDeformRoIPool", "DeformPSRoIPool", "ModulatedDeformPSRoIPool"]
Run = Callable[[tuple[Tensor, ...]], np.ndarray]


class Pooling(nn.Module):
    """`pool_rois` as a module that takes tensors only; "ROIAlignV2" is Detectron2's pooler."""

    def __init__(self, name: str) -> None:
        super().__init__()

        def level_pooler(scale: float) -> nn.Module:
            return getattr(layers, name)(3, scale, CHANNELS, 8)

        torch.manual_seed(0)
        plain = name == "ROIAlignV2"
        scales = [1 / 16, 1 / 32]
        self.pooler = DCNROIPooler(3, scales, 0, "ROIAlignV2", None if plain else level_pooler, mmdet_levels=True)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.requires_grad_(False)

    def forward(self, p4: Tensor, p5: Tensor, rois: Tensor) -> Tensor:
        return pool_rois(self.pooler, [p4, p5], rois)


def operands(rois: int, height: int, width: int, images: int = 2, largest: float = 1.0) -> tuple[Tensor, ...]:
    """Maps of random values, and RoIs of all levels, some of which leave the image or are empty."""
    generator = torch.Generator().manual_seed(rois + height)
    maps = [torch.randn(images, CHANNELS, height // s, width // s, generator=generator) for s in (16, 32)]
    centre = torch.rand(rois, 2, generator=generator) * torch.tensor([width, height])
    size = torch.rand(rois, 2, generator=generator).square() * torch.tensor([width, height]) * 1.5 * largest
    boxes = torch.cat([centre - size / 2, centre + size / 2], 1)
    boxes[3::7, 2] = boxes[3::7, 0]  # no width
    boxes[4::7] = 0  # what detections are padded with
    boxes[5::7] += 3000  # off the image
    image = torch.randint(0, images, (rois, 1), generator=generator)
    return *maps, torch.cat([image.float(), boxes], 1)


# One graph runs them all. The fourth has RoIs of the finest level only, the fifth none.
CALLS = [operands(40, 512, 640), operands(1, 512, 640), operands(23, 320, 192, 1), operands(9, 256, 256, 3, 0.1)]
CALLS.append(operands(0, 256, 320))


def onnx_file(model: nn.Module, path: Path, dynamo: bool) -> str:
    pytest.importorskip("onnxscript")
    axes = {name: {0: "images", 2: f"height_{name}", 3: f"width_{name}"} for name in NAMES[:2]} | {"rois": {0: "rois"}}
    free = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    # torch.onnx.export switches the portable operators on by itself.
    if dynamo:
        shapes = (free, free, {0: torch.export.Dim.DYNAMIC})
        torch.onnx.export(
            model,
            CALLS[0],
            path,
            input_names=NAMES,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=20,
            verbose=False,
        )
    else:
        torch.onnx.export(model, CALLS[0], path, input_names=NAMES, dynamo=False, dynamic_axes=axes, opset_version=19)
    return str(path)


def check(run: Run, name: str) -> None:
    model = Pooling(name)
    for call in CALLS:
        found, expected = run(call), model(*call)
        assert found.shape == expected.shape
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "name, dynamo",
    [
        *((name, False) for name in (*POOLERS, "ROIAlignV2")),
        (POOLERS[1], True),
        pytest.param(POOLERS[3], True, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "dynamo" if value else "traced",
)
def test_onnx_runtime_gives_the_same(name: str, dynamo: bool, tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    file = onnx_file(Pooling(name), tmp_path / "pooling.onnx", dynamo)
    onnx.checker.check_model(file, full_check=True)
    graph = onnx.load(file)
    assert {node.domain for node in graph.graph.node} == {""} and not graph.functions
    assert "RoiAlign" in {node.op_type for node in graph.graph.node}
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    check(lambda call: session.run(None, dict(zip(NAMES, (value.numpy() for value in call))))[0], name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [*POOLERS, "ROIAlignV2"])
def test_openvino_gives_the_same(name: str) -> None:
    openvino = pytest.importorskip("openvino")
    with portable_operators():
        traced = torch.jit.trace(Pooling(name), CALLS[0], check_trace=False)
    converted = openvino.convert_model(traced, example_input=CALLS[0])
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    check(lambda call: compiled([value.numpy() for value in call])[0], name)


@pytest.mark.parametrize("portable", [False, True], ids=["operators", "portable"])
@pytest.mark.parametrize("name", [POOLERS[0], POOLERS[3], "ROIAlignV2"])
def test_torch_export_gives_the_same(name: str, portable: bool) -> None:
    free = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    shapes = (free, free, {0: torch.export.Dim.DYNAMIC})
    model = Pooling(name)
    if portable:
        with portable_operators():
            program = torch.export.export(model, CALLS[0], dynamic_shapes=shapes)
    else:
        program = torch.export.export(model, CALLS[0], dynamic_shapes=shapes)
    used = {str(node.target).partition("::")[0].partition(".")[0] for node in program.graph.nodes}
    assert ("dcn_d2" in used) == (not portable and name != "ROIAlignV2")
    run = program.module()
    check(lambda call: run(*call).numpy(), name)
