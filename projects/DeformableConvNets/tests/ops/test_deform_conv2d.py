# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import functools
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcn_d2.ops import deform_conv2d, reference

from .samples import (
    CONV_SAMPLES,
    DEVICES,
    EMPTY_BATCH,
    ConvSample,
    assert_same,
    by_name,
    gradients,
    number_of_threads,
    shifted,
    turned_columns,
)

parametrize_samples = pytest.mark.parametrize("sample", CONV_SAMPLES, ids=by_name)
parametrize_devices = pytest.mark.parametrize("device", DEVICES)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def oracle(sample: ConvSample, **operands: Any) -> Tensor:
    operands = {"bias": None, "mask": None} | operands
    return reference.deform_conv2d(**operands, **sample.geometry)


def compiled(sample: ConvSample, **operands: Any) -> Tensor:
    return deform_conv2d(**operands, **sample.geometry)


@parametrize_devices
@parametrize_samples
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference(sample: ConvSample, dtype: torch.dtype, device: str) -> None:
    operands = sample.tensors(dtype, device)
    # The reference gets the same rounded operands in float64, so that the difference is the operator's own.
    exact = {name: t.double() for name, t in operands.items()}
    actual = gradients(functools.partial(compiled, sample), operands)
    assert all(t.dtype == dtype for t in actual.values())
    assert_same(actual, gradients(functools.partial(oracle, sample), exact), TOLERANCE[dtype])


@parametrize_devices
@parametrize_samples
def test_equals_torchvision(sample: ConvSample, device: str) -> None:
    operands = sample.tensors(torch.float64, device)
    expected = gradients(functools.partial(torchvision.ops.deform_conv2d, **sample.geometry), operands)
    actual = gradients(functools.partial(compiled, sample), operands)
    if sample.spread == 0:  # samples at exactly -1: test_offset_gradient_at_the_window
        del actual["offset"], expected["offset"]
    assert_same(actual, expected, 1e-10)


def test_offset_gradient_at_the_window() -> None:
    # A sample at exactly -1 lies outside the window -1 < position: no value, no gradient, as in MMDetection's kernels.
    # torchvision gives the one-sided derivative there, which every network with padding meets at its zero offsets.
    image, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
    offset = torch.zeros(1, 18, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(deform_conv2d(image, offset, weight, padding=1).sum(), offset)
    by_y = grad[0, 0::2].reshape(3, 3, 4, 4)  # kernel row, kernel column, output row, output column
    assert not by_y[0, :, 0].any()  # row -1
    assert not by_y[1, :, 1:3].any()  # rows 1 and 2 of a flat image
    assert by_y[1, 1, 3].eq(-1).all()  # row 3, below which zeros begin
    assert not by_y[2, :, 3].any()  # row 4


@parametrize_devices
@parametrize_samples
def test_gradcheck(sample: ConvSample, device: str) -> None:
    operands = {name: t.requires_grad_() for name, t in sample.tensors(torch.float64, device).items()}
    if sample.spread == 0:
        operands["offset"] = (operands["offset"].detach() + 0.3).requires_grad_()  # off the kinks of the lattice

    def function(*tensors: Tensor) -> Tensor:
        return compiled(sample, **dict(zip(operands, tensors)))

    assert torch.autograd.gradcheck(function, tuple(operands.values()), nondet_tol=1e-9, fast_mode=True)


@parametrize_devices
@pytest.mark.parametrize("sample", [CONV_SAMPLES[2], CONV_SAMPLES[4], EMPTY_BATCH], ids=by_name)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(sample: ConvSample, memory_format: torch.memory_format, device: str) -> None:
    operands = sample.tensors(device=device)
    for name in ("input", "weight"):
        operands[name] = operands[name].contiguous(memory_format=memory_format)
    operands = {name: t.requires_grad_() for name, t in operands.items()}
    arguments = (operands["input"], operands["offset"], operands["weight"], operands["bias"])
    torch.library.opcheck(
        torch.ops.dcn_d2.deform_conv2d.default, arguments, dict(sample.geometry, mask=operands["mask"])
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups, deform_groups = number(1, 3), number(1, 3)
    kernel, padding = (number(1, 4), number(1, 4)), (number(0, 3), number(0, 3))
    dilation = (number(1, 3), number(1, 3))
    least = [max(d * (k - 1) + 1 - 2 * p, 1) for k, d, p in zip(kernel, dilation, padding)]
    sample = ConvSample(
        "any",
        batch=number(0, 3),
        channels=groups * deform_groups * number(1, 3),
        out_channels=groups * number(1, 4),
        size=(least[0] + number(0, 9), least[1] + number(0, 9)),
        kernel=kernel,
        stride=(number(1, 3), number(1, 3)),
        padding=padding,
        dilation=dilation,
        groups=groups,
        deform_groups=deform_groups,
        mask=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
        spread=data.draw(st.sampled_from([0.0, 1.0, 10.0])),
    )
    operands = sample.tensors(seed=number(0, 9))
    expected = gradients(functools.partial(oracle, sample), operands)
    assert_same(gradients(functools.partial(compiled, sample), operands), expected, 1e-10)


def test_hand_checkable_numbers() -> None:
    image = torch.arange(9.0).reshape(1, 1, 3, 3)  # value 3y + x
    weight = torch.ones(1, 1, 1, 1)
    offset = torch.zeros(1, 2, 3, 3)
    offset[0, 0], offset[0, 1] = 0.5, 0.25  # y moves by a half, x by a quarter
    output = deform_conv2d(image, offset, weight)
    assert output[0, 0, 0, 0] == 3 * 0.5 + 0.25  # inside, where the image is linear
    assert output[0, 0, 2, 1] == 0.5 * (6 + 1.25)  # the row below the image counts as zero
    half = deform_conv2d(image, offset, weight, mask=torch.full((1, 1, 3, 3), 0.5))
    assert torch.equal(half, output / 2)


@parametrize_devices
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30], ids=str)
@pytest.mark.parametrize(("channels", "dtype"), [(2, torch.float32), (8, torch.float32), (8, torch.bfloat16)], ids=str)
def test_wild_offsets_read_zero(channels: int, dtype: torch.dtype, bad: float, device: str) -> None:
    # Such as CUDA multiplies on tensor cores, and such as it does not.
    sample = ConvSample("wild", channels=2 * channels, out_channels=8, deform_groups=2)
    operands = sample.tensors(dtype, device)
    operands["offset"][:, ::7] = bad
    clean = dict(operands, offset=operands["offset"].clone())
    clean["offset"][:, ::7] = 1000.0  # outside as well, and harmless
    actual, expected = (gradients(functools.partial(compiled, sample), each) for each in (operands, clean))
    assert all(bool(torch.isfinite(t).all()) for t in actual.values())
    assert_same(actual, expected, 0.0)
    assert not actual["offset"][:, ::7].any()


@parametrize_devices
def test_empty_batch(device: str) -> None:
    found = gradients(functools.partial(compiled, EMPTY_BATCH), EMPTY_BATCH.tensors(torch.float32, device))
    assert found["output"].shape == (0, EMPTY_BATCH.out_channels, *EMPTY_BATCH.out_size)
    assert not found["weight"].any() and found["input"].shape[0] == 0


def test_positions_outside_do_not_touch_infinities() -> None:
    image = torch.full((1, 1, 2, 2), float("inf"))
    output = deform_conv2d(image, torch.full((1, 2, 2, 2), -5.0), torch.ones(1, 1, 1, 1))
    assert not output.any()


@parametrize_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_format_is_kept(dtype: torch.dtype, device: str) -> None:
    sample = ConvSample("format", channels=8, groups=2, deform_groups=2)
    operands = sample.tensors(dtype, device)
    expected = gradients(functools.partial(compiled, sample), operands)
    last = {n: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for n, t in operands.items()}
    actual = gradients(functools.partial(compiled, sample), last)
    assert expected["output"].is_contiguous()
    assert actual["output"].is_contiguous(memory_format=torch.channels_last)
    assert actual["input"].is_contiguous(memory_format=torch.channels_last)
    assert actual["weight"].is_contiguous(memory_format=torch.channels_last)
    assert_same(actual, expected, TOLERANCE[dtype])


def test_non_contiguous_operands() -> None:
    sample = ConvSample("views")
    operands = sample.tensors()
    padded = {name: torch.stack([t, -t], -1)[..., 0] for name, t in operands.items()}
    assert not any(t.is_contiguous() for t in padded.values())
    expected = gradients(functools.partial(compiled, sample), operands)
    actual = {"output": compiled(sample, **padded)}
    assert_same(actual, {"output": expected["output"]}, 0.0)


def check_as_given(sample: ConvSample, operands: dict[str, Tensor], grad: Tensor) -> None:
    """Compares with the reference, without a copy in which the operands' strides and places would be others."""
    leaves = {name: t.detach().requires_grad_() for name, t in operands.items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in operands.items()}
    output, expected = compiled(sample, **leaves), oracle(sample, **exact)
    found = torch.autograd.grad(output, list(leaves.values()), grad)
    wanted = torch.autograd.grad(expected, list(exact.values()), grad.double())
    actual = {"output": output.detach()} | dict(zip(leaves, found))
    assert_same(actual, {"output": expected.detach()} | dict(zip(leaves, wanted)), TOLERANCE[grad.dtype])


@parametrize_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["input", "offset", "weight", "bias", "mask", "grad"])
def test_alignment_to_an_element(
    name: str, memory_format: torch.memory_format, dtype: torch.dtype, device: str
) -> None:
    # Of channels that CUDA reads 16 bytes at a time, if they lie so that it can.
    sample = ConvSample("shifted", channels=16, out_channels=24, deform_groups=2)
    operands = sample.tensors(dtype, device)
    grad = torch.randn(2, 24, *sample.out_size, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    tensors = {
        key: t.contiguous(memory_format=memory_format) if t.dim() == 4 else t
        for key, t in (operands | {"grad": grad}).items()
    }
    tensors[name] = shifted(tensors[name])
    check_as_given(sample, tensors, tensors.pop("grad"))


@parametrize_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_one_column_of_any_stride(dtype: torch.dtype, device: str) -> None:
    sample = ConvSample("column", channels=16, out_channels=8, size=(9, 1), kernel=(3, 1), padding=(1, 0))
    operands = sample.tensors(dtype, device)
    grad = torch.randn(2, 8, 9, 1, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    turned = {name: turned_columns(t) if t.dim() == 4 else t for name, t in operands.items()}
    check_as_given(sample, turned, turned_columns(grad))


def test_expanded_output_gradient() -> None:
    operands = {name: t.requires_grad_() for name, t in CONV_SAMPLES[1].tensors().items()}
    output = compiled(CONV_SAMPLES[1], **operands)
    summed = torch.autograd.grad(output.sum(), operands["input"], retain_graph=True)[0]  # gradient of strides 0
    dense = torch.autograd.grad(output, operands["input"], torch.ones_like(output))[0]
    assert torch.equal(summed, dense)


@pytest.mark.parametrize("needed", ["input", "offset", "weight", "bias", "mask"])
def test_one_gradient_alone(needed: str) -> None:
    operands = CONV_SAMPLES[4].tensors()
    everything = gradients(functools.partial(compiled, CONV_SAMPLES[4]), operands)
    operands[needed].requires_grad_()
    output = compiled(CONV_SAMPLES[4], **operands)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.backward(grad)
    torch.testing.assert_close(operands[needed].grad, everything[needed], rtol=0, atol=1e-12)


def test_same_bits_from_run_to_run() -> None:
    operands = ConvSample("bits", batch=3, channels=32, size=(20, 20)).tensors(torch.float32)
    sample = ConvSample("bits", batch=3, channels=32, size=(20, 20))
    first, second = (gradients(functools.partial(compiled, sample), operands) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    sample = ConvSample("threads", batch=2, channels=48, deform_groups=2, size=(11, 13))
    operands = sample.tensors()
    with number_of_threads(threads):
        actual = gradients(functools.partial(compiled, sample), operands)
    assert_same(actual, gradients(functools.partial(oracle, sample), operands), 1e-10)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_many_channels_and_tiles(groups: int, memory_format: torch.memory_format) -> None:
    # So many that the backward pass goes over the image several times.
    sample = ConvSample("many", batch=1, channels=1040, out_channels=6, size=(18, 19), kernel=(2, 1), groups=groups)
    operands = {name: t.contiguous() for name, t in sample.tensors().items()}
    operands["input"] = operands["input"].contiguous(memory_format=memory_format)
    actual = gradients(functools.partial(compiled, sample), operands)
    assert_same(actual, gradients(functools.partial(oracle, sample), operands), 1e-10)


@parametrize_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_stays_half(dtype: torch.dtype, device: str) -> None:
    sample = CONV_SAMPLES[1]
    operands = sample.tensors(torch.float32, device)
    operands["input"] = operands["input"].to(dtype)  # mixed, as the layers before leave it
    with torch.autocast(device, dtype):
        found = gradients(functools.partial(compiled, sample), operands)
    assert found["output"].dtype == dtype
    assert found["input"].dtype == dtype and found["weight"].dtype == torch.float32
    # The CPU's kernels take positions in float32.
    exact = {n: t if device == "cpu" and n in ("offset", "mask") else t.to(dtype) for n, t in operands.items()}
    expected = gradients(functools.partial(oracle, sample), {n: t.double() for n, t in exact.items()})
    assert_same(found, expected, TOLERANCE[dtype])


@parametrize_samples
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_with_positions_in_float32(sample: ConvSample, dtype: torch.dtype) -> None:
    operands = {n: t if n in ("offset", "mask") else t.to(dtype) for n, t in sample.tensors(torch.float32).items()}
    found = gradients(functools.partial(compiled, sample), operands)
    for name, tensor in operands.items():
        assert found[name].dtype == tensor.dtype
    expected = gradients(functools.partial(oracle, sample), {n: t.double() for n, t in operands.items()})
    assert_same(found, expected, TOLERANCE[dtype])
    meta = compiled(sample, **{n: t.to("meta") for n, t in operands.items()})
    assert meta.dtype == dtype and meta.shape == found["output"].shape


@parametrize_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_deterministic_algorithms_are_honoured(dtype: torch.dtype, device: str) -> None:
    sample = ConvSample("deterministic", channels=32, out_channels=16, size=(23, 29), deform_groups=2, spread=4.0)
    operands = sample.tensors(dtype, device)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (gradients(functools.partial(compiled, sample), operands) for _ in range(3))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


# What is replaced, and what the message must name.
BAD_OPERANDS: list[tuple[dict[str, Any], str]] = [
    ({"input": torch.zeros(4, 7, 9)}, r"input must have 4 dimensions, got \[4, 7, 9\]"),
    ({"offset": torch.zeros(2, 18, 63)}, r"offset must have 4 dimensions, got \[2, 18, 63\]"),
    ({"offset": torch.zeros(2, 17, 7, 9)}, r"offset has 17 channels.*2 \* 3 \* 3"),
    ({"offset": torch.zeros(2, 54, 7, 9)}, r"input has 4 channels.*offset's 3 groups"),
    ({"offset": torch.zeros(2, 18, 6, 9)}, r"offset must have shape \[2, 18, 7, 9\], got \[2, 18, 6, 9\]"),
    ({"offset": torch.zeros(1, 18, 7, 9)}, r"offset must have shape \[2, 18, 7, 9\], got \[1, 18, 7, 9\]"),
    ({"mask": torch.zeros(2, 18, 7, 9)}, r"mask must have shape \[2, 9, 7, 9\], got \[2, 18, 7, 9\]"),
    ({"mask": torch.zeros(2, 9, 7, 8)}, r"mask must have shape \[2, 9, 7, 9\], got \[2, 9, 7, 8\]"),
    ({"weight": torch.zeros(6, 3, 3, 3)}, r"input has 4 channels.*weight's 3"),
    ({"weight": torch.zeros(5, 2, 3, 3)}, r"weight has 5 output channels.*2 groups"),
    ({"weight": torch.zeros(6, 4, 3)}, r"weight must have 4 dimensions, got \[6, 4, 3\]"),
    ({"weight": torch.zeros(6, 4, 12, 3)}, r"offset has 18 channels.*2 \* 12 \* 3|too small"),
    ({"bias": torch.zeros(5)}, r"bias must have shape \[6\], got \[5\]"),
    ({"offset": torch.zeros(2, 18, 7, 9, dtype=torch.float64)}, r"offset has dtype .*, but input has"),
    ({"mask": torch.zeros(2, 9, 7, 9, dtype=torch.float16)}, r"mask has dtype .*, but input has"),
    ({"input": torch.zeros(2, 4, 7, 9, dtype=torch.int64)}, r"input must be float64, float32, float16 or bfloat16"),
    ({"stride": (0, 1)}, r"stride must be .*at least 1, got \[0, 1\]"),
    ({"padding": (0, -1)}, r"padding must be .*at least 0, got \[0, -1\]"),
    ({"dilation": (1, 0)}, r"dilation must be .*at least 1, got \[1, 0\]"),
]


@pytest.mark.parametrize(("change", "message"), BAD_OPERANDS)
@pytest.mark.parametrize("path", ["compiled", "fake"])
def test_bad_operands_are_named(change: dict[str, Any], message: str, path: str) -> None:
    operands = ConvSample("good").tensors(torch.float32) | {"padding": (1, 1)} | change
    if path == "fake":
        operands = {name: t.to("meta") if isinstance(t, Tensor) else t for name, t in operands.items()}
    with pytest.raises(RuntimeError, match="deform_conv2d: " + message):
        deform_conv2d(**operands)


def test_strides_are_numbers_or_pairs() -> None:
    operands = ConvSample("good").tensors()
    torch.testing.assert_close(deform_conv2d(**operands, padding=1), deform_conv2d(**operands, padding=(1, 1)))
    with pytest.raises(ValueError, match=r"stride must be a number or a pair of numbers, got \(1, 2, 3\)"):
        deform_conv2d(**operands, stride=(1, 2, 3))


@pytest.mark.slow
def test_compiles_and_exports_with_dynamic_shapes() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = torch.nn.Conv2d(4, 27, 3, padding=1)
            self.weight = torch.nn.Parameter(torch.randn(6, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            offset, mask = self.offset(x).split([18, 9], 1)
            return deform_conv2d(x, offset, self.weight, padding=1, mask=mask.sigmoid())

    torch.manual_seed(0)
    layer, images = Layer(), [torch.randn(2, 4, 12, 17), torch.randn(3, 4, 9, 22)]
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
    exported = torch.export.export(layer, (images[0],), dynamic_shapes=({0: batch, 2: height, 3: width},)).module()
    traced = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for image in images:
        expected = layer(image)
        torch.testing.assert_close(exported(image), expected)
        actual = traced(image)
        torch.testing.assert_close(actual, expected)
        for a, e in zip(*(torch.autograd.grad(out.sum(), layer.parameters()) for out in (actual, expected))):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
