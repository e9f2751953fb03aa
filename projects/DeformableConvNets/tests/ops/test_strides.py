# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Real kernels return what their fake kernels promise, in strides too: compiled code reads memory by the promise.

A kernel that kept another order gave a stride assertion under Inductor, and wrong numbers where it checks none.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcn_d2.ops
from dcn_d2.ops import deform_conv2d

from .layouts import LAYOUTS, as_tuple, calls, describe, promised
from .paths import DEVICES
from .samples import STRIDE_SAMPLES, Sample

parametrize_samples = pytest.mark.parametrize(
    ("name", "sample"), [pytest.param(name, sample, id=f"{name}-{sample.name}") for name, sample in STRIDE_SAMPLES]
)
parametrize_devices = pytest.mark.parametrize("device", DEVICES)


@parametrize_devices
@parametrize_samples
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_results_have_the_promised_strides(name: str, sample: Sample, dtype: torch.dtype, device: str) -> None:
    for seed, layout in enumerate([*LAYOUTS, None, None, None]):
        for operator, arguments in calls(name, sample, dtype, device, random.Random(seed), layout):
            expected = promised(operator, arguments)
            found = [describe(result) for result in as_tuple(operator(*arguments))]
            assert found == expected, f"{operator}, {layout}, seed {seed}"


@pytest.mark.filterwarnings("ignore:dcn_d2")
@parametrize_samples
def test_the_reference_has_the_promised_strides(name: str, sample: Sample) -> None:
    in_python = torch._C.DispatchKey.CompositeExplicitAutograd
    for seed, layout in enumerate(["channels_last", "some_channels", "expanded", "permuted", None]):
        for operator, arguments in calls(name, sample, torch.float32, "cpu", random.Random(seed), layout):
            expected = promised(operator, arguments)
            # The dispatcher resolves the negative bit before it calls a kernel.
            plain = [value.resolve_neg() if isinstance(value, Tensor) else value for value in arguments]
            found = [describe(result) for result in as_tuple(operator._op_dk(in_python, *plain))]
            assert found == expected, f"{operator}, {layout}, seed {seed}"


OPCHECKED = ["channels_last", "some_channels", "cut_out", "expanded", "permuted", "negative_bit", "odd_strides_of_ones"]


@pytest.mark.unsanitized
@pytest.mark.parametrize("layout", OPCHECKED)
@pytest.mark.parametrize(
    ("name", "sample"),
    [
        pytest.param(name, sample, id=f"{name}-{sample.name}")
        for name, sample in STRIDE_SAMPLES
        if sample.name in ("usual", "one_image", "one_channel", "cells")
    ],
)
def test_opcheck_of_any_layout(name: str, sample: Sample, layout: str) -> None:
    for operator, arguments in calls(name, sample, torch.float64, "cpu", random.Random(1), layout):
        if not operator._schema.name.endswith("_backward"):
            arguments = [
                value.detach().requires_grad_() if isinstance(value, Tensor) and argument.name != "rois" else value
                for argument, value in zip(operator._schema.arguments, arguments)
            ]
        torch.library.opcheck(operator, tuple(arguments))


@parametrize_devices
def test_what_is_channels_last(device: str) -> None:
    """Slices of a channels_last map stay channels_last, as in torch's convolutions; so they need not be turned."""
    weight = torch.randn(6, 8, 3, 3, device=device)

    def output_of(x: Tensor) -> Tensor:
        return deform_conv2d(x, torch.zeros(x.shape[0], 18, *x.shape[2:], device=device), weight, padding=1)

    wide = torch.randn(2, 24, 7, 9, device=device).contiguous(memory_format=torch.channels_last)
    turned = [wide[:, :8], wide[:, 3:11], wide[:1, :8], wide[:, :8, 1:], wide[:, :8, :, 2:5]]
    assert all(output_of(x).is_contiguous(memory_format=torch.channels_last) for x in turned)
    transposed, image = torch.randn(2, 8, 9, 7, device=device).transpose(2, 3), torch.randn(1, 8, 7, 9, device=device)
    straight = [wide[:, :8].contiguous(), transposed, wide[:, ::3], image.expand(2, -1, -1, -1)]
    assert all(output_of(x).is_contiguous() for x in straight)


def image_first(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1)[None]


COMPILED_LAYOUTS = {
    "permuted_image": lambda: image_first(torch.rand(9, 11, 8)),
    "some_channels": lambda: torch.rand(2, 16, 9, 11).contiguous(memory_format=torch.channels_last)[:, :8],
    "channels_last": lambda: torch.rand(2, 8, 9, 11).contiguous(memory_format=torch.channels_last),
    "expanded": lambda: torch.rand(1, 8, 9, 11).expand(3, -1, -1, -1),
    "transposed": lambda: torch.rand(2, 8, 11, 9).transpose(2, 3),
    "contiguous": lambda: torch.rand(2, 8, 9, 11),
}


class Everything(nn.Module):
    """All operators, between operations that a compiler fuses and so reads by the promised strides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branch = nn.Conv2d(8, 27, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(6, 8, 3, 3).contiguous(memory_format=torch.channels_last))
        self.sliced = nn.Parameter(torch.randn(6, 16, 3, 3).contiguous(memory_format=torch.channels_last))
        self.register_buffer("rois", torch.tensor([[0, 1.3, 0.7, 8.1, 6.9], [0, 2.0, 3.0, 7.5, 5.2]]))
        self.shift = nn.Parameter(torch.randn(2, 2, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        joint = self.branch(x)
        offset, mask = joint.split([18, 9], 1)
        plain = deform_conv2d(x, offset, self.weight, padding=1, mask=mask.sigmoid()).relu()
        whole = dcn_d2.ops.modulated_deform_conv2d(x, joint, self.sliced[:, 4:12], padding=1).sin()
        pools = (dcn_d2.ops.deform_roi_pool, dcn_d2.ops.deform_psroi_pool)
        pooled = [pool(x, self.rois, self.shift, (3, 2)).cos() for pool in pools]
        return torch.cat([t.flatten() for t in (plain + whole, *pooled)])


def needs_compiler() -> None:
    if not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler, which Inductor needs for the CPU")


def train_step(function: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients by the parameters and by the input, through an operation before and after."""
    leaf = x.detach().requires_grad_()
    output = function(leaf)
    weights = torch.linspace(-1, 1, output.numel())
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), [leaf, *model.parameters()])]


@pytest.mark.slow
@pytest.mark.unsanitized
@pytest.mark.parametrize(
    ("layout", "dynamic"), [*((layout, False) for layout in COMPILED_LAYOUTS), ("some_channels", True)]
)
def test_inductor_computes_what_eager_does(layout: str, dynamic: bool) -> None:
    needs_compiler()
    torch._dynamo.reset()
    model, x = Everything(), COMPILED_LAYOUTS[layout]()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for actual, expected in zip(train_step(compiled, model, x), train_step(model, model, x)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert actual.shape == expected.shape


@pytest.mark.slow
@pytest.mark.unsanitized
@pytest.mark.parametrize("layout", ["permuted_image", "some_channels", "channels_last"])
def test_aotinductor_computes_what_eager_does(layout: str, tmp_path: Path) -> None:
    """AOTInductor checks no strides: a broken promise gave wrong numbers without a message."""
    needs_compiler()
    model, x = Everything().eval(), COMPILED_LAYOUTS[layout]()
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.unsanitized
def test_one_compiled_graph_serves_every_size() -> None:
    """The rule of memory formats asks about sizes and strides, which must not tie the graph to those of the first."""
    torch._dynamo.reset()
    weight = torch.randn(6, 8, 3, 3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, dynamic=True, fullgraph=True)
    def function(x: Tensor, offset: Tensor) -> Tensor:
        return deform_conv2d(x, offset, weight, padding=1).relu()

    for memory_format in (torch.contiguous_format, torch.channels_last):
        counter.clear()
        for batch, height, width in ((2, 5, 7), (3, 9, 4), (5, 6, 6)):
            x = torch.randn(batch, 8, height, width).contiguous(memory_format=memory_format)
            offset = torch.randn(batch, 18, height, width)
            assert function(x, offset).stride() == deform_conv2d(x, offset, weight, padding=1).stride()
        assert counter.frame_count <= 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_batches_that_are_not_known_while_tracing_are_compared_at_run_time(memory_format: torch.memory_format) -> None:
    def function(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return deform_conv2d(input, offset, weight, padding=1).relu()

    torch._dynamo.reset()
    compiled, weight = torch.compile(function, backend="aot_eager", fullgraph=True), torch.rand(6, 4, 3, 3)
    for images in (2, 0, 1, 5):
        input = torch.rand(images, 4, 5, 6).to(memory_format=memory_format)
        offset = torch.randn(images, 18, 5, 6)
        for tensor in (input, offset):
            torch._dynamo.decorators.mark_unbacked(tensor, 0)
        assert torch.equal(compiled(input, offset, weight), function(input, offset, weight))
