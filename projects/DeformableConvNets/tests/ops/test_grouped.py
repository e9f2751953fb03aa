# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The CPU path for many small groups with as many outputs as inputs, and the shapes next to it."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcn_d2.ops import deform_conv2d, reference

from .samples import ConvSample, assert_same, by_name, gradients, number_of_threads

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}


def grouped(name: str, group_channels: int, groups: int, **changes: Any) -> ConvSample:
    channels = group_channels * groups
    return ConvSample(name, channels=channels, out_channels=channels, groups=groups, **changes)


# A vector holds 2 to 16 channels: each size of group is less than one, one, or several of them somewhere.
SAMPLES = [
    grouped("depthwise", 1, 48),
    grouped("2_channels", 2, 24, kernel=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    grouped("4_channels", 4, 12, deform_groups=3),
    grouped("8_channels", 8, 4, mask=False, bias=False),
    grouped("16_channels", 16, 5, stride=(2, 2), size=(11, 13)),
    grouped("32_channels", 32, 2, deform_groups=2),
    grouped("64_channels", 64, 2, batch=1),
    grouped("rest_of_a_vector", 4, 5),
    grouped("deform_groups_cut_vectors", 4, 12, deform_groups=12),
    grouped("deform_groups_cut_groups", 16, 2, deform_groups=8),
    grouped("3_channels", 3, 16),
    ConvSample("other_outputs", channels=32, out_channels=64, groups=8),
    grouped("many_positions", 4, 8, size=(23, 29), batch=3),
    grouped("one_position", 8, 4, size=(1, 1)),
    grouped("no_spread", 8, 4, spread=0.0),
    grouped("leaves_the_image", 4, 8, spread=30.0),
]
parametrize_samples = pytest.mark.parametrize("sample", SAMPLES, ids=by_name)


def compiled(sample: ConvSample, **operands: Any) -> Tensor:
    return deform_conv2d(**operands, **sample.geometry)


def check(sample: ConvSample, dtype: torch.dtype, channels_last: bool = False) -> None:
    """Compares output and gradients with the reference's in float64."""
    operands = sample.tensors(dtype)
    # Positions that every dtype holds exactly: one rounded to the other side of a pixel has another derivative.
    if sample.spread and dtype != torch.bfloat16:
        operands["offset"] = ((operands["offset"] * 64).floor() + 0.5) / 64
    exact = {"bias": None, "mask": None} | {name: t.double() for name, t in operands.items()}
    if channels_last:
        operands["input"] = operands["input"].contiguous(memory_format=torch.channels_last)
    actual = gradients(functools.partial(compiled, sample), operands)
    if channels_last and sample.batch:
        assert actual["output"].is_contiguous(memory_format=torch.channels_last)
    expected = gradients(functools.partial(reference.deform_conv2d, **sample.geometry), exact)
    assert_same(actual, expected, TOLERANCE[dtype])


@parametrize_samples
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference(sample: ConvSample, dtype: torch.dtype, channels_last: bool) -> None:
    check(sample, dtype, channels_last)


@parametrize_samples
def test_gradcheck(sample: ConvSample) -> None:
    operands = {name: t.requires_grad_() for name, t in sample.tensors().items()}
    if sample.spread == 0:
        operands["offset"] = (operands["offset"].detach() + 0.3).requires_grad_()  # off the kinks of the lattice

    def function(*tensors: Tensor) -> Tensor:
        return compiled(sample, **dict(zip(operands, tensors)))

    assert torch.autograd.gradcheck(function, tuple(operands.values()), fast_mode=True)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    group_channels, deform_groups = data.draw(st.sampled_from([1, 2, 4, 8, 16, 32])), number(1, 3)
    sample = grouped(
        "any",
        group_channels,
        deform_groups * number(1, 96 // (group_channels * deform_groups)),
        deform_groups=deform_groups,
        batch=number(0, 2),
        size=(number(3, 17), number(3, 17)),
        stride=(number(1, 2), number(1, 2)),
        mask=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
    )
    check(sample, data.draw(st.sampled_from([torch.float64, torch.float32])), data.draw(st.booleans()))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int, batch: int) -> None:
    sample = grouped("threads", 4, 20, batch=batch, deform_groups=5, size=(19, 13))
    with number_of_threads(threads):
        check(sample, torch.float64)
        operands = sample.tensors(torch.float32)
        first, second = (gradients(functools.partial(compiled, sample), operands) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30], ids=str)
@pytest.mark.parametrize("group_channels", [4, 8, 16])
def test_wild_offsets_read_zero(bad: float, group_channels: int) -> None:
    sample = grouped("wild", group_channels, 8, deform_groups=2)
    operands = sample.tensors(torch.float32)
    operands["offset"][:, ::7] = bad
    clean = dict(operands, offset=operands["offset"].clone())
    clean["offset"][:, ::7] = 1000.0  # outside as well, and harmless
    actual, expected = (gradients(functools.partial(compiled, sample), each) for each in (operands, clean))
    assert all(bool(torch.isfinite(t).all()) for t in actual.values())
    assert_same(actual, expected, 0.0)
    assert not actual["offset"][:, ::7].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_bad_pixels_stay_in_their_group(bad: float) -> None:
    sample = replace(grouped("bad_pixels", 4, 8), spread=0.5)
    operands = sample.tensors(torch.float32)
    expected = gradients(functools.partial(compiled, sample), operands)
    operands["input"][:, 5] = bad  # of the second group
    actual = gradients(functools.partial(compiled, sample), operands)
    others = [c for c in range(32) if not 4 <= c < 8]
    for name in ("output", "input", "weight"):
        axis = 0 if name == "weight" else 1
        index = torch.tensor(others)
        assert torch.equal(actual[name].index_select(axis, index), expected[name].index_select(axis, index)), name
    assert not bool(actual["output"][:, 4:8].isfinite().all())


def test_positions_outside_do_not_touch_infinities() -> None:
    image = torch.full((1, 32, 3, 3), float("inf"))
    output = deform_conv2d(image, torch.full((1, 2, 3, 3), -5.0), torch.ones(32, 4, 1, 1))
    assert not output.any()


def test_infinite_gradients_stay_inside() -> None:
    # What lies outside the image is nobody's: it must not come back at samples that read it.
    image, weight = torch.ones(1, 32, 2, 2, requires_grad=True), torch.ones(32, 4, 1, 1)
    offset = torch.zeros(1, 2, 2, 2)
    offset[..., 0, 0] = -0.5  # the first sample reads one pixel, and three places outside
    grad = torch.zeros(1, 32, 2, 2)
    grad[..., 0, 0] = float("inf")
    (found,) = torch.autograd.grad(deform_conv2d(image, offset, weight), image, grad)
    assert bool(found[..., 0, 0].isinf().all())
    assert not found.flatten(2)[..., 1:].any()


@pytest.mark.parametrize("needed", ["input", "offset", "weight", "bias", "mask"])
def test_one_gradient_alone(needed: str) -> None:
    sample = SAMPLES[2]
    operands = sample.tensors()
    everything = gradients(functools.partial(compiled, sample), operands)
    operands[needed].requires_grad_()
    output = compiled(sample, **operands)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.backward(grad)
    torch.testing.assert_close(operands[needed].grad, everything[needed], rtol=0, atol=1e-12)
