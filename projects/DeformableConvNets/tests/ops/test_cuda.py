# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: streams, graphs, several devices, mixed precision, tensors of more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dcn_d2.ops
from dcn_d2.layers import ModulatedDeformConvPack
from dcn_d2.ops import deform_conv2d, deform_psroi_pool, deform_roi_pool, reference

from .checks import TOLERANCE, assert_same, in_float64
from .samples import CONV_SAMPLES, ConvSample, RoiSample, by_name

pytestmark = pytest.mark.gpu


def need_memory(gigabytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free >> 30} are free")


SAMPLES = [
    *(sample for sample in CONV_SAMPLES if sample.name in ("modulated", "tensor_cores")),
    RoiSample("deform_roi_pool"),
]


def run(sample: ConvSample | RoiSample, operands: dict[str, Tensor]) -> list[Tensor]:
    """Output and gradients of one sample, without waiting for the GPU."""
    leaves = {name: t.requires_grad_(name != "rois") for name, t in operands.items()}
    if isinstance(sample, ConvSample):
        output = deform_conv2d(**leaves, **sample.geometry)
    else:
        output = deform_roi_pool(**leaves, **sample.arguments)
    return [output, *torch.autograd.grad(output.sum(), [t for t in leaves.values() if t.requires_grad])]


# CUDA has two ways of computing in float32.
ARITHMETIC = {str(dtype).removeprefix("torch."): value for dtype, value in TOLERANCE.items()} | {"tf32": 5e-3}
ONE_BY_ONE = [
    *(("deform_conv2d", wanted) for wanted in ("output", "input", "offset", "weight")),
    *((name, wanted) for name in ("deform_roi_pool", "deform_psroi_pool") for wanted in ("output", "input", "offset")),
]


@pytest.mark.parametrize(
    "arithmetic", [pytest.param(name, marks=pytest.mark.one_kernel(arithmetic=name)) for name in ARITHMETIC]
)
@pytest.mark.parametrize(("name", "wanted"), ONE_BY_ONE)
def test_kernels_one_by_one(name: str, wanted: str, arithmetic: str, device: str = "cuda") -> None:
    """As few kernels as there can be: what to look at first where other tests fail."""
    torch.backends.cudnn.allow_tf32 = arithmetic == "tf32"
    dtype = torch.float32 if arithmetic == "tf32" else getattr(torch, arithmetic)
    sample: ConvSample | RoiSample
    if name == "deform_conv2d":
        sample = ConvSample("wide", channels=64, out_channels=72, size=(17, 19), deform_groups=2)
        arguments: dict[str, Any] = sample.geometry
    else:
        sample = RoiSample("vectors", channels=24)
        arguments = sample.arguments
    operands: dict[str, Tensor] = sample.tensors(dtype, device)
    exact = in_float64(operands)

    def run(operator: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if wanted == "output":
            return {wanted: operator(**values, **arguments)}
        leaf = values[wanted].requires_grad_()
        output = operator(**values, **arguments)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        return {wanted: torch.autograd.grad(output, leaf, grad.to(output.dtype))[0]}

    expected = run(getattr(reference, name), exact)
    assert_same(run(getattr(dcn_d2.ops, name), operands), expected, ARITHMETIC[arithmetic])


@pytest.mark.parametrize("sample", SAMPLES, ids=by_name)
def test_kernels_go_to_the_current_stream(sample: ConvSample | RoiSample) -> None:
    operands: dict[str, Tensor] = sample.tensors(torch.float32, "cuda")
    late = {name: torch.full_like(t, torch.nan) for name, t in operands.items()}
    expected = run(sample, operands)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would not wait for this one, nor for what follows
        for name, t in operands.items():
            late[name].copy_(t)
    with torch.cuda.stream(stream):
        found = run(sample, late)
        copies = [t.clone() for t in found]
    stream.synchronize()
    for a, b in zip(copies, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="only one GPU is visible to torch")
@pytest.mark.parametrize("sample", SAMPLES, ids=by_name)
def test_tensors_on_another_device_than_the_current_one(sample: ConvSample | RoiSample) -> None:
    with torch.cuda.device(0):
        found = run(sample, sample.tensors(torch.float32, "cuda:1"))
        assert torch.cuda.current_device() == 0
    for a, b in zip(found, run(sample, sample.tensors(torch.float32, "cuda:0"))):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_of_forward_and_backward_replays(dtype: torch.dtype) -> None:
    """Nothing waits for the GPU, and nothing depends on what tensors hold."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cuda").to(dtype)

    operands = [normal(2, 32, 24, 25), normal(2, 27, 24, 25), normal(40, 32, 3, 3)]
    grad = normal(2, 40, 24, 25)
    geometry: list[Any] = [[1, 1], [1, 1], [1, 1]]

    def both() -> list[Tensor]:
        output = torch.ops.dcn_d2.modulated_deform_conv2d(*operands, None, *geometry)
        gradients = torch.ops.dcn_d2.modulated_deform_conv2d_backward(grad, *operands, *geometry, True, True, True)
        return [output, *gradients]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()  # loads the kernels
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for tensor in (*operands, grad):
        tensor.copy_(normal(*tensor.shape))
    graph.replay()
    for a, b in zip(captured, both()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layers_learn_in_mixed_precision(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Two layers learn what two others compute, offsets included; the loss is that of float32 up to rounding."""

    def network() -> torch.nn.Sequential:
        layers = [ModulatedDeformConvPack(16, 32, 3, padding=1), ModulatedDeformConvPack(32, 16, 3, padding=1)]
        for layer in layers:
            torch.nn.init.normal_(layer.conv_offset.weight, std=0.05)
        return torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1]).to("cuda", memory_format=memory_format)

    def train(enabled: bool) -> list[float]:
        torch.manual_seed(0)
        teacher, student = network(), network()
        optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
        scaler = torch.amp.GradScaler("cuda", enabled=enabled and dtype == torch.float16)
        losses = []
        for _ in range(60):
            images = torch.randn(4, 16, 20, 22, device="cuda").contiguous(memory_format=memory_format)
            with torch.autocast("cuda", dtype, enabled=enabled):
                loss = (student(images) - teacher(images).detach()).float().square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        return losses

    mixed, full = train(True), train(False)
    assert mixed[-1] < 0.6 * mixed[0]
    assert abs(mixed[-1] - full[-1]) < 0.1 * full[0]


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.determinism
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("operator", [deform_roi_pool, deform_psroi_pool])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_deterministic_pooling_gives_the_same_bits(operator: Any, dtype: torch.dtype) -> None:
    """Again and again, and in whatever order the RoIs come; all of them lie on the same few pixels."""
    generator = torch.Generator().manual_seed(0)
    count = 200

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to("cuda", dtype)

    input, offset, mask = normal(1, 64, 12, 13), normal(count, 2, 7, 7), normal(count, 1, 7, 7).sigmoid()
    corners = (torch.rand(count, 2, 2, generator=generator) * 50).sort(1).values.flatten(1)
    rois = torch.cat([torch.zeros(count, 1), corners], 1).cuda()
    grad = normal(count, 64, 7, 7)

    def run(order: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (input, offset[order], mask[order])]
        output = operator(leaves[0], rois[order], leaves[1], 7, 0.25, mask=leaves[2])
        found = torch.autograd.grad(output, leaves, grad[order])
        back = order.argsort()
        return [found[0], found[1][back], found[2][back]]

    expected = run(torch.arange(count, device="cuda"))
    assert all(bool(t.isfinite().all()) for t in expected)
    for _ in range(5):
        for a, b in zip(run(torch.randperm(count, generator=generator).cuda()), expected):
            assert torch.equal(a, b)


def conv_parts(values: dict[str, Tensor], grad: Tensor, images: slice) -> list[Tensor]:
    """Output and the gradients of input and offset of some images."""
    geometry: list[Any] = [[1, 1], [0, 0], [1, 1]]
    input, offset = values["input"][images], values["offset"][images]
    output = torch.ops.dcn_d2.deform_conv2d(input, offset, values["weight"], None, *geometry, None)
    grad_input, grad_offset, _, _ = torch.ops.dcn_d2.deform_conv2d_backward(
        grad[images], input, offset, values["weight"], None, *geometry, True, True, False
    )
    return [output, grad_input, grad_offset]


@pytest.mark.slow
def test_deform_conv2d_past_2_31_elements(size: int = 8000, device: str = "cuda") -> None:
    need_memory(70)
    options: dict[str, Any] = {"dtype": torch.float16, "device": device}
    values = {
        "input": torch.randn(3, 16, size, size, **options),
        "offset": torch.randn(3, 2, size, size, **options),
        "weight": torch.randn(16, 16, 1, 1, **options),
    }
    grad = torch.randn(3, 16, size, size, **options)
    last = [t[2:].clone() for t in conv_parts(values, grad, slice(None))]
    for a, b in zip(last, conv_parts(values, grad, slice(2, 3))):
        assert (a - b).abs().max() <= 0.02 * b.abs().max()


@pytest.mark.slow
def test_deform_roi_pool_past_2_31_elements(count: int = 100_000, device: str = "cuda") -> None:
    need_memory(20)
    options: dict[str, Any] = {"dtype": torch.float16, "device": device}
    input = torch.randn(2, 512, 32, 32, **options)
    corners = (torch.rand(count, 2, 2, device=device) * 32).sort(1).values.flatten(1)
    rois = torch.cat([torch.arange(count, device=device)[:, None] % 2, corners], 1)
    offset = torch.randn(count, 2, 7, 7, **options)
    last = deform_roi_pool(input, rois, offset, 7)[-10:].clone()
    assert torch.equal(last, deform_roi_pool(input, rois[-10:], offset[-10:], 7))
