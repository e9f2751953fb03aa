# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from dcn_d2.layers import ModulatedDeformConvPack, split_offset_and_mask
from dcn_d2.ops import modulated_deform_conv2d, reference

from .samples import CONV_SAMPLES, DEVICES, EMPTY_BATCH, ConvSample, assert_same, by_name, gradients, number_of_threads

# Channels of which the CPU has a path for many small groups.
RESNEXT = ConvSample("resnext", channels=32, out_channels=32, groups=8, deform_groups=2)
SAMPLES = [sample for sample in [*CONV_SAMPLES, RESNEXT] if sample.mask]
parametrize_samples = pytest.mark.parametrize("sample", SAMPLES, ids=by_name)
parametrize_devices = pytest.mark.parametrize("device", DEVICES)
FORMATS = [torch.contiguous_format, torch.channels_last]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def branch_output(sample: ConvSample, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Tensor]:
    """The sample's operands, with random logits in place of the mask."""
    operands = sample.tensors(dtype, device)
    logits = operands.pop("mask").logit().to(dtype)
    return operands | {"offset_and_mask": torch.cat([operands.pop("offset"), logits], dim=1)}


def compiled(sample: ConvSample, **operands: Any) -> Tensor:
    return modulated_deform_conv2d(**operands, **sample.geometry)


def oracle(sample: ConvSample, *, offset_and_mask: Tensor, bias: Tensor | None = None, **operands: Any) -> Tensor:
    offset, mask = split_offset_and_mask(offset_and_mask)
    return reference.deform_conv2d(**operands, bias=bias, offset=offset, mask=mask, **sample.geometry)


@parametrize_devices
@parametrize_samples
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_equals_reference(
    sample: ConvSample, dtype: torch.dtype, memory_format: torch.memory_format, device: str
) -> None:
    operands = branch_output(sample, dtype, device)
    for name in ("input", "offset_and_mask", "weight"):
        operands[name] = operands[name].contiguous(memory_format=memory_format)
    exact = {name: t.double() for name, t in operands.items()}
    actual = gradients(functools.partial(compiled, sample), operands)
    for name in ("input", "offset_and_mask"):
        assert actual[name].dtype == dtype and actual[name].is_contiguous(memory_format=memory_format)
    assert_same(actual, gradients(functools.partial(oracle, sample), exact), TOLERANCE[dtype])


@parametrize_devices
def test_logits_of_any_size(device: str) -> None:
    # A pixel of 1 under every tap and a weight of 1 leave the modulation itself.
    values = [-torch.inf, -1e30, -100.0, -87.5, -80.0, -20.0, -1e-7, 0.0, 1e-7, 0.5, 20.0, 87.5, 1e30, torch.inf]
    spread = torch.linspace(-90, 90, 10007)
    logits = torch.cat([torch.tensor(values), spread]).reshape(1, 1, 1, -1)
    offset_and_mask = torch.cat([torch.zeros(1, 2, 1, logits.numel()), logits], dim=1).to(device)
    ones = torch.ones(1, 1, 1, logits.numel(), device=device)
    found = modulated_deform_conv2d(ones, offset_and_mask, torch.ones(1, 1, 1, 1, device=device)).cpu()
    expected = logits.double().sigmoid().float()
    normal = logits >= -87  # below them the modulation is zero, up to the smallest normal numbers
    torch.testing.assert_close(found[normal], expected[normal], rtol=3e-7 if device == "cpu" else 6e-7, atol=0)
    torch.testing.assert_close(found[~normal], expected[~normal], rtol=0, atol=2e-38)


@parametrize_devices
def test_a_logit_that_is_not_a_number_shows(device: str) -> None:
    offset_and_mask = torch.zeros(1, 3, 1, 2, device=device)
    offset_and_mask[0, 2, 0, 1] = torch.nan
    ones = torch.ones(1, 1, 1, 2, device=device)
    found = modulated_deform_conv2d(ones, offset_and_mask, ones[..., :1])
    assert found[0, 0, 0, 0] == 0.5 and found[0, 0, 0, 1].isnan()


@parametrize_devices
@pytest.mark.parametrize("sample", [SAMPLES[0], SAMPLES[3], RESNEXT], ids=by_name)
def test_gradcheck(sample: ConvSample, device: str) -> None:
    operands = {name: t.requires_grad_() for name, t in branch_output(sample, device=device).items()}

    def function(*tensors: Tensor) -> Tensor:
        return compiled(sample, **dict(zip(operands, tensors)))

    assert torch.autograd.gradcheck(function, tuple(operands.values()), nondet_tol=1e-9, fast_mode=True)


@parametrize_devices
@pytest.mark.parametrize("sample", [SAMPLES[0], RESNEXT, EMPTY_BATCH], ids=by_name)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_opcheck(sample: ConvSample, memory_format: torch.memory_format, device: str) -> None:
    operands = {name: t.requires_grad_() for name, t in branch_output(sample, device=device).items()}
    for name in ("input", "offset_and_mask", "weight"):
        operands[name] = operands[name].detach().contiguous(memory_format=memory_format).requires_grad_()
    arguments = tuple(operands[name] for name in ("input", "offset_and_mask", "weight", "bias"))
    torch.library.opcheck(torch.ops.dcn_d2.modulated_deform_conv2d.default, arguments, dict(sample.geometry))


@pytest.mark.parametrize("needed", ["input", "offset_and_mask", "weight", "bias"])
def test_one_gradient_alone(needed: str) -> None:
    sample = SAMPLES[2]
    operands = branch_output(sample)
    everything = gradients(functools.partial(compiled, sample), operands)
    operands[needed].requires_grad_()
    output = compiled(sample, **operands)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    torch.testing.assert_close(operands[needed].grad, everything[needed], rtol=0, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    sample = ConvSample("threads", batch=2, channels=48, deform_groups=2, size=(11, 13))
    operands = branch_output(sample)
    with number_of_threads(threads):
        actual = gradients(functools.partial(compiled, sample), operands)
    assert_same(actual, gradients(functools.partial(oracle, sample), operands), 1e-10)


def test_parts_of_a_larger_tensor() -> None:
    sample = SAMPLES[0]
    operands = branch_output(sample)
    expected = compiled(sample, **operands)
    larger = torch.cat([operands["offset_and_mask"]] * 2, dim=1)
    for memory_format in FORMATS:
        part = larger.contiguous(memory_format=memory_format)[:, 27:]
        assert not part.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(compiled(sample, **operands | {"offset_and_mask": part}), expected)


@parametrize_devices
def test_autocast_stays_half(device: str) -> None:
    operands = branch_output(SAMPLES[0], torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        found = gradients(functools.partial(compiled, SAMPLES[0]), operands)
    assert found["output"].dtype == torch.bfloat16 and found["offset_and_mask"].dtype == torch.float32
    # The CPU's kernels take positions in float32.
    exact = {n: t if device == "cpu" and n == "offset_and_mask" else t.bfloat16() for n, t in operands.items()}
    rounded = {name: t.double() for name, t in exact.items()}
    assert_same(found, gradients(functools.partial(oracle, SAMPLES[0]), rounded), TOLERANCE[torch.bfloat16])


@parametrize_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_algorithms_are_honoured(dtype: torch.dtype, device: str) -> None:
    sample = ConvSample("deterministic", channels=32, out_channels=16, size=(23, 29), deform_groups=2, spread=4.0)
    operands = branch_output(sample, dtype, device)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (gradients(functools.partial(compiled, sample), operands) for _ in range(3))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


BAD_OPERANDS: list[tuple[dict[str, Any], str]] = [
    ({"offset_and_mask": torch.zeros(2, 18, 7, 9)}, r"modulated_.*: offset_and_mask has 18 channels.*3 \* 3 \* 3"),
    ({"offset_and_mask": torch.zeros(2, 27, 63)}, r"offset_and_mask must have 4 dimensions, got \[2, 27, 63\]"),
    (
        {"offset_and_mask": torch.zeros(2, 27, 6, 9)},
        r"modulated_deform.*: offset_and_mask must have shape \[2, 27, 7, 9\], got \[2, 27, 6, 9\]",
    ),
    (
        {"offset_and_mask": torch.zeros(2, 27, 7, 9, dtype=torch.float64)},
        r"modulated_.*: offset_and_mask has dtype .*, but",
    ),
    ({"weight": torch.zeros(6, 4, 3)}, r"weight must have 4 dimensions, got \[6, 4, 3\]"),
    ({"bias": torch.zeros(5)}, r"bias must have shape \[6\], got \[5\]"),
    ({"stride": (0, 1)}, r"stride must be .*at least 1, got \[0, 1\]"),
]


@pytest.mark.parametrize(("change", "message"), BAD_OPERANDS)
@pytest.mark.parametrize("path", ["compiled", "fake"])
def test_bad_operands_are_named(change: dict[str, Any], message: str, path: str) -> None:
    operands = branch_output(ConvSample("good"), torch.float32) | {"padding": (1, 1)} | change
    if path == "fake":
        operands = {name: t.to("meta") if isinstance(t, Tensor) else t for name, t in operands.items()}
    with pytest.raises(RuntimeError, match=message):
        modulated_deform_conv2d(**operands)


def test_devices_without_a_kernel_go_in_parts() -> None:
    # As CUDA does where no kernel of the whole is compiled.
    whole = torch.ops.dcn_d2.modulated_deform_conv2d.default
    backward = torch.ops.dcn_d2.modulated_deform_conv2d_backward.default
    sample = dataclasses.replace(SAMPLES[0], bias=False)
    operands = branch_output(sample)
    arguments = (operands["input"], operands["offset_and_mask"], operands["weight"])
    geometry = tuple(sample.geometry.values())
    in_parts = torch._C.DispatchKey.CompositeExplicitAutograd
    grad = torch.randn(whole(*arguments, None, *geometry).shape, dtype=torch.float64)
    actual = whole._op_dk(in_parts, *arguments, None, *geometry)
    torch.testing.assert_close(actual, whole(*arguments, None, *geometry))
    needed = (True, True, True)
    for a, b in zip(
        backward._op_dk(in_parts, grad, *arguments, *geometry, *needed), backward(grad, *arguments, *geometry, *needed)
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_layer_compiles_and_exports() -> None:
    torch.manual_seed(0)
    layer = ModulatedDeformConvPack(4, 6, 3, padding=1)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.3)
    images = [torch.randn(2, 4, 12, 17), torch.randn(3, 4, 9, 22)]
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
    program = torch.export.export(layer, (images[0],), dynamic_shapes=({0: batch, 2: height, 3: width},))
    called = {str(node.target) for node in program.graph.nodes}
    assert "dcn_d2.deform_conv2d.default" in called  # which exporters to other runtimes know
    assert "dcn_d2.modulated_deform_conv2d.default" not in called
    compiled_layer = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for image in images:
        expected = layer(image)
        torch.testing.assert_close(program.module()(image), expected)
        actual = compiled_layer(image)
        torch.testing.assert_close(actual, expected)
        for a, e in zip(*(torch.autograd.grad(out.sum(), list(layer.parameters())) for out in (actual, expected))):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
