# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""bfloat16 on CPU, which has a path of its own on processors with matrix tiles: shapes that fill no tile, and threads.

The oracle is the reference in float64 for the same operands. Offsets are odd multiples of 1/32: there no position is a
whole number, where rounding could make any difference to the gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcn_d2.ops import deform_conv2d, reference

from .samples import ConvSample, by_name, number_of_threads

TOLERANCE = 1e-2  # of the norm of the error over the norm of the result

# Tiles are 16 rows of 32 values, and pairs of them are multiplied at a time.
SAMPLES = [
    ConvSample("one_channel", channels=1, out_channels=1),
    ConvSample("less_than_a_tile", channels=7, out_channels=5),
    ConvSample("one_tile", channels=32, out_channels=16),
    ConvSample("rest_of_a_block", channels=33, out_channels=17),
    ConvSample("odd_rest", channels=47, out_channels=31, batch=1),
    ConvSample("three_tiles", channels=96, out_channels=48),
    ConvSample("three_panels", channels=64, out_channels=81, size=(5, 6)),
    ConvSample("one_position", channels=40, out_channels=24, size=(1, 1)),
    ConvSample("odd_positions", channels=40, out_channels=24, size=(5, 9)),
    ConvSample("several_tiles_of_positions", channels=16, out_channels=16, size=(29, 37)),
    ConvSample("several_segments", channels=160, out_channels=200, size=(6, 7)),
    ConvSample("deform_groups", channels=72, out_channels=40, deform_groups=3),
    ConvSample("deform_groups_cut_blocks", channels=80, out_channels=20, deform_groups=20),
    ConvSample("groups", channels=96, out_channels=60, groups=2),
    ConvSample("groups_across_deform_groups", channels=120, out_channels=30, groups=3, deform_groups=5),
    ConvSample("strided", channels=48, out_channels=48, stride=(2, 3), padding=(0, 2), size=(13, 17)),
    ConvSample("large_kernel", channels=34, out_channels=18, kernel=(5, 4), dilation=(2, 1), padding=(4, 2)),
    ConvSample("pointwise", channels=64, out_channels=64, kernel=(1, 1), padding=(0, 0), mask=False, bias=False),
    ConvSample("no_mask", channels=64, out_channels=32, mask=False),
    ConvSample("leaves_the_image", channels=36, out_channels=20, spread=30.0),
]


def results(function: Callable[..., Tensor], sample: ConvSample, operands: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients for an output gradient that bfloat16 holds exactly."""
    leaves = {name: t.detach().clone(memory_format=torch.preserve_format) for name, t in operands.items()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    output = function(**leaves, **sample.geometry)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(output)
    found = torch.autograd.grad(output, list(leaves.values()), grad)
    return {"output": output.detach()} | dict(zip(leaves, found))


def operands_of(sample: ConvSample, channels_last: bool = False) -> dict[str, Tensor]:
    operands = sample.tensors(torch.float32)
    operands["offset"] = ((operands["offset"] * 16).floor().clamp(-63, 63) * 2 + 1) / 32
    if sample.spread > 10:
        operands["offset"] *= 8
    operands["weight"] /= operands["weight"][0].numel() ** 0.5
    operands = {name: t.bfloat16() for name, t in operands.items()}
    if channels_last:
        operands["input"] = operands["input"].contiguous(memory_format=torch.channels_last)
    return operands


def oracle(input: Tensor, offset: Tensor, weight: Tensor, **others: Any) -> Tensor:
    return reference.deform_conv2d(input, offset, weight, **({"bias": None, "mask": None} | others))


def check(sample: ConvSample, channels_last: bool) -> None:
    """Compares output and all gradients with the reference's."""
    operands = operands_of(sample, channels_last)
    actual = results(deform_conv2d, sample, operands)
    exact = {name: t.double() for name, t in operands.items()}
    expected = results(oracle, sample, exact)
    if not operands["input"].is_contiguous():
        assert actual["output"].is_contiguous(memory_format=torch.channels_last)
    for name, value in actual.items():
        assert value.dtype == torch.bfloat16
        error, norm = (value.double() - expected[name]).norm(), expected[name].norm()
        assert error <= TOLERANCE * norm, (name, float(error / norm))


@pytest.mark.parametrize("sample", SAMPLES, ids=by_name)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_equals_reference(sample: ConvSample, channels_last: bool) -> None:
    check(sample, channels_last)


def test_empty_batch_has_zero_gradients() -> None:
    sample = ConvSample("empty_batch", channels=36, out_channels=20, batch=0)
    found = results(deform_conv2d, sample, operands_of(sample))
    assert found["output"].shape == (0, 20, *sample.out_size)
    assert not found["weight"].any() and not found["bias"].any()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups, deform_groups = number(1, 2), number(1, 3)
    sample = ConvSample(
        "any",
        batch=number(1, 3),
        channels=groups * deform_groups * number(1, 70 // (groups * deform_groups)),
        out_channels=groups * number(1, 70 // groups),
        groups=groups,
        deform_groups=deform_groups,
        size=(number(3, 19), number(3, 19)),
        kernel=(number(1, 3), number(1, 3)),
        stride=(number(1, 2), number(1, 2)),
        padding=(1, 1),
        mask=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
    )
    check(sample, data.draw(st.booleans()))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int, batch: int) -> None:
    sample = ConvSample("threads", batch=batch, channels=100, out_channels=72, size=(19, 13))
    with number_of_threads(threads):
        check(sample, channels_last=True)
        operands = operands_of(sample)
        first, second = (results(deform_conv2d, sample, operands) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("needed", ["input", "offset", "weight", "bias", "mask"])
def test_one_gradient_alone(needed: str) -> None:
    sample = ConvSample("alone", channels=40, out_channels=24)
    operands = operands_of(sample)
    everything = results(deform_conv2d, sample, operands)
    leaf = operands[needed].requires_grad_()
    output = deform_conv2d(**operands, **sample.geometry)  # type: ignore[arg-type]
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16())
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, everything[needed])


@pytest.mark.parametrize("threads", [1, 3])
def test_weight_in_channels_last(threads: int) -> None:
    sample = ConvSample("weight", channels=40, out_channels=24, batch=3)
    operands = operands_of(sample)
    other = dict(operands, weight=operands["weight"].contiguous(memory_format=torch.channels_last))
    with number_of_threads(threads):
        expected, actual = (results(deform_conv2d, sample, each) for each in (operands, other))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert actual["weight"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30], ids=str)
def test_wild_offsets_read_zero(bad: float) -> None:
    sample = ConvSample("wild", channels=40, out_channels=24, deform_groups=2)
    operands = operands_of(sample)
    operands["offset"][:, ::7] = bad
    clean = dict(operands, offset=operands["offset"].clone())
    clean["offset"][:, ::7] = 1000.0  # outside as well, and harmless
    actual, expected = (results(deform_conv2d, sample, each) for each in (operands, clean))
    assert all(bool(torch.isfinite(t).all()) for t in actual.values())
    assert all(torch.equal(actual[name], expected[name]) for name in actual)
    assert not actual["offset"][:, ::7].any()


def test_positions_outside_do_not_touch_infinities() -> None:
    image = torch.full((1, 40, 3, 3), float("inf"), dtype=torch.bfloat16)
    offset = torch.full((1, 2, 3, 3), -5.0, dtype=torch.bfloat16)
    assert not deform_conv2d(image, offset, torch.ones(4, 40, 1, 1, dtype=torch.bfloat16)).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_bad_pixels_come_through(bad: float) -> None:
    # Only the sums that read them, and with the same value as in float32.
    image = torch.ones(1, 40, 4, 4, dtype=torch.bfloat16)
    image[0, 3, 1, 2] = bad
    offset, weight = torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16), torch.ones(5, 40, 1, 1, dtype=torch.bfloat16)
    offset[:] = 0.25  # a whole number would read a pixel with weight 0, which makes NaN of infinity
    output = deform_conv2d(image, offset, weight)
    single = deform_conv2d(image.float(), offset.float(), weight.float())
    assert bool(output.isfinite().logical_not().any())
    assert torch.equal(output.isnan(), single.isnan())
    assert torch.equal(output.isinf(), single.isinf())


def test_sums_are_not_rounded_on_the_way() -> None:
    # 4096 ones and as many of 1/64: in bfloat16 sums beyond 256 would stay where they are.
    image = torch.ones(1, 8192, 1, 1, dtype=torch.bfloat16)
    image[:, 4096:] = 1 / 64
    weight = torch.ones(1, 8192, 1, 1, dtype=torch.bfloat16)
    output = deform_conv2d(image, torch.zeros(1, 2, 1, 1, dtype=torch.bfloat16), weight)
    assert output.item() == 4160.0


def test_matrix_tiles_are_used_where_they_are() -> None:
    """Their path is several times as fast as the float32 one: noise cannot hide it."""
    if os.environ.get("DCN_CPU_CAPABILITY", "amx") != "amx" or "DCN_LIBRARY" in os.environ:
        pytest.skip("capped, or a build that is not optimised")
    info = Path("/proc/cpuinfo")
    if not info.exists() or not {"amx_bf16", "amx_tile", "avx512_bf16"} <= set(info.read_text().split()):
        pytest.skip("the processor has no matrix tiles for bfloat16")
    from torch.utils.benchmark import Timer

    operands = operands_of(ConvSample("large", batch=1, channels=256, out_channels=256, size=(32, 32)), True)
    single = {name: t.float() for name, t in operands.items()}
    run = "with torch.no_grad(): deform_conv2d(**operands, padding=1)"
    scope = {"torch": torch, "deform_conv2d": deform_conv2d}
    half, full = (
        Timer(run, globals=scope | {"operands": each}, num_threads=1).timeit(5).mean for each in (operands, single)
    )
    assert half < full / 1.5, (half, full)
