# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Within `portable_operators()` and ONNX exports, convolutions are recorded as torchvision's operator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcn_d2.layers import DeformConv, DeformConvPack, ModulatedDeformConv, ModulatedDeformConvPack
from dcn_d2.ops import deform_conv2d, modulated_deform_conv2d, portable_operators

pytest.importorskip("torchvision")
pytestmark = [
    pytest.mark.unsanitized,
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
]


class Call(nn.Module):
    """A module that calls an operator with the geometry that it holds."""

    def __init__(self, operator: Any, **geometry: Any) -> None:
        super().__init__()
        self.operator, self.geometry = operator, geometry

    def forward(self, *operands: Tensor) -> Tensor:
        return self.operator(*operands, **self.geometry)


class WithMask(Call):
    """The last of its operands is the mask, and there is no bias."""

    def forward(self, *operands: Tensor) -> Tensor:
        *others, mask = operands
        return self.operator(*others, mask=mask, **self.geometry)


def variants() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Modules that convolve in all variants, and operands for each."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4, 9, 8), torch.randn(6, 4, 3, 2), torch.randn(6)
    offset, mask = torch.randn(2, 12, 9, 9), torch.rand(2, 6, 9, 9)
    grouped, many = torch.randn(6, 2, 3, 2), torch.randn(2, 24, 5, 7)
    wide: dict[str, Any] = dict(stride=(2, 1), padding=(2, 1), dilation=(2, 3))
    layer: dict[str, Any] = dict(kernel_size=3, stride=2, padding=1, groups=2, deformable_groups=2)
    moved, factors = torch.randn(2, 36, 5, 4), torch.rand(2, 18, 5, 4)
    found = {
        "plain": (Call(deform_conv2d, padding=1), (x, offset, weight)),
        "bias": (Call(deform_conv2d, padding=1), (x, offset, weight, bias)),
        "mask": (WithMask(deform_conv2d, padding=1), (x, offset, weight, mask)),
        "all": (WithMask(deform_conv2d, padding=1), (x, offset, weight, bias, mask)),
        "groups and geometry": (Call(deform_conv2d, **wide), (x, many, grouped)),
        "branch": (Call(modulated_deform_conv2d, padding=1), (x, torch.cat([offset, mask], 1), weight)),
        "DeformConv": (DeformConv(4, 6, **layer), (x, moved)),
        "ModulatedDeformConv": (ModulatedDeformConv(4, 6, **layer), (x, moved, factors)),
        "ModulatedDeformConv of a branch": (ModulatedDeformConv(4, 6, **layer), (x, torch.cat([moved, factors], 1))),
        "DeformConvPack": (DeformConvPack(4, 6, **layer), (x,)),
        "ModulatedDeformConvPack": (ModulatedDeformConvPack(4, 6, **layer), (x,)),
    }
    for module, _ in found.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        module.eval()
    return found


VARIANTS = variants()
parametrize_variants = pytest.mark.parametrize("name", VARIANTS)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@parametrize_variants
def test_values_and_gradients_are_the_same(name: str) -> None:
    module, operands = VARIANTS[name]
    leaves = [operand.clone().requires_grad_() for operand in operands]
    expected = module(*leaves)
    with portable_operators():
        found = module(*leaves)
        gradients = torch.autograd.grad(found.sin().sum(), leaves)
    assert_close(found, expected)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.sin().sum(), leaves)):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3)


@parametrize_variants
def test_traces_hold_torchvisions_operator_within_only(name: str) -> None:
    module, operands = VARIANTS[name]
    outside = torch.jit.trace(module, operands)
    with portable_operators():
        inside = torch.jit.trace(module, operands)
    assert "dcn_d2::" in str(outside.inlined_graph) and "torchvision::" not in str(outside.inlined_graph)
    assert "torchvision::deform_conv2d" in str(inside.inlined_graph) and "dcn_d2::" not in str(inside.inlined_graph)
    assert_close(inside(*operands), outside(*operands))


# Exporters take seconds, so not every one gets every variant. Those by tracing are quick.
SOME = ("plain", "groups and geometry", "ModulatedDeformConvPack")


@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in VARIANTS), *((name, True) for name in SOME)])
def test_exported_programs_hold_torchvisions_operator_within_only(name: str, strict: bool) -> None:
    module, operands = VARIANTS[name]

    def targets(program: Any) -> set[str]:
        return {str(node.target) for node in program.graph.nodes if "deform_conv2d" in str(node.target)}

    assert targets(torch.export.export(module, operands, strict=strict)) <= {
        "dcn_d2.deform_conv2d.default",
        "dcn_d2.modulated_deform_conv2d.default",
    }
    with portable_operators():
        program = torch.export.export(module, operands, strict=strict)
    assert targets(program) == {"torchvision.deform_conv2d.default"}
    assert_close(program.module()(*operands), module(*operands))


@pytest.mark.parametrize(("name", "dynamo"), [*((name, False) for name in VARIANTS), *((name, True) for name in SOME)])
def test_onnx_runtime_computes_the_same(name: str, dynamo: bool, tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, operands = VARIANTS[name]
    file = str(tmp_path / "model.onnx")
    names = [f"input{index}" for index in range(len(operands))]
    options: dict[str, Any] = {"verbose": False} if dynamo else {"do_constant_folding": True}
    torch.onnx.export(module, operands, file, dynamo=dynamo, opset_version=19, input_names=names, **options)
    nodes = onnx.load(file).graph.node
    assert [node.op_type for node in nodes].count("DeformConv") == 1 and not any(node.domain for node in nodes)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, dict(zip(names, (operand.numpy() for operand in operands))))
    assert_close(torch.from_numpy(found), module(*operands))


def test_an_export_leaves_the_operators_as_they_were(tmp_path: Path) -> None:
    module, operands = VARIANTS["ModulatedDeformConvPack"]
    with portable_operators(), pytest.raises(ValueError), portable_operators():
        raise ValueError
    assert "dcn_d2::deform_conv2d" in str(torch.jit.trace(module, operands).inlined_graph)


def test_bad_operands_are_refused_in_the_same_words() -> None:
    x, offset, weight = torch.zeros(1, 2, 5, 5), torch.zeros(1, 17, 5, 5), torch.zeros(2, 2, 3, 3)
    with portable_operators():
        with pytest.raises(RuntimeError, match="^deform_conv2d: offset has 17 channels, but needs a multiple of 2"):
            deform_conv2d(x, offset, weight, padding=1)
        with pytest.raises(RuntimeError, match="^modulated_deform_conv2d: offset_and_mask has 17 channels"):
            modulated_deform_conv2d(x, offset, weight, padding=1)


def test_that_torchvision_is_missing_is_said() -> None:
    code = """
import sys, torch
sys.modules["torchvision"] = None
from dcn_d2.ops import deform_conv2d, portable_operators
x, o, w = torch.zeros(1, 2, 5, 5), torch.zeros(1, 18, 5, 5), torch.zeros(2, 2, 3, 3)
deform_conv2d(x, o, w, padding=1)
with portable_operators():
    deform_conv2d(x, o, w, padding=1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Install it: pip install torchvision" in done.stderr


def test_the_first_import_of_torchvision_broke_a_trace() -> None:
    """When it is imported it calls an operator, which the trace would have recorded."""
    code = """
import sys, torch
from dcn_d2.layers import DeformConvPack
from dcn_d2.ops import portable_operators
assert "torchvision" not in sys.modules
with portable_operators():
    traced = torch.jit.trace(DeformConvPack(4, 8, 3), (torch.rand(1, 4, 5, 6),))
print([node.kind() for node in traced.inlined_graph.nodes() if node.kind().startswith("torchvision::")])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout == "['torchvision::deform_conv2d']\n", done.stderr
