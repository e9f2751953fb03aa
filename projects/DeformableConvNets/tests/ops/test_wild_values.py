# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Offsets, RoIs, pixels and gradients that are not finite, or very far away: what they touch, and what they do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dcn_d2.ops
from dcn_d2.ops import deform_conv2d, reference

from .checks import assert_same_bits, gradients, results
from .paths import CPU, CUDA, DEVICES, GROUPED, TILED, Case, parametrize_cases
from .samples import POOLINGS, ConvSample, RoiSample, grouped

NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


def wild(channels: int, out_channels: int = 8, groups: int = 1) -> ConvSample:
    return ConvSample(f"wild_{channels}", channels=channels, out_channels=out_channels, groups=groups, deform_groups=2)


def offsets_of(values: dict[str, Tensor]) -> Tensor:
    """The offsets, or their gradient, also where they lie in one tensor with the mask."""
    joint = values.get("offset_and_mask")
    return values["offset"] if joint is None else joint[:, : joint.shape[1] // 3 * 2]


@pytest.mark.instruction_set
@pytest.mark.parametrize("bad", [*NOT_FINITE, 1e30, -1e30], ids=str)
@parametrize_cases(
    [
        *(
            Case(operator, path, wild(channels), dtype)
            for operator in ("deform_conv2d", "modulated_deform_conv2d")
            for path in (CPU, CUDA)
            # CUDA multiplies the first on ordinary cores, the others on tensor cores.
            for channels, dtype in ((4, torch.float32), (16, torch.float32), (16, torch.bfloat16))
        ),
        *(Case("deform_conv2d", GROUPED, wild(8 * n, 8 * n, groups=8), torch.float32) for n in (4, 8, 16)),
        Case("deform_conv2d", TILED, wild(40, 24), torch.bfloat16),
    ]
)
def test_wild_offsets_read_zero(case: Case, bad: float) -> None:
    operands = case.operands()
    clean = {name: t.clone() for name, t in operands.items()}
    offsets_of(operands)[:, ::7] = bad
    offsets_of(clean)[:, ::7] = 1000.0  # outside as well, and harmless
    actual, expected = (results(case.operator, case.sample, each) for each in (operands, clean))
    assert all(bool(torch.isfinite(t).all()) for t in actual.values())
    assert_same_bits(expected, actual)
    assert not offsets_of(actual)[:, ::7].any()


@pytest.mark.parametrize("bad", [*NOT_FINITE, 1e30], ids=str)
@parametrize_cases(
    Case(operator, path, RoiSample("wild"), torch.float32) for operator in POOLINGS for path in (CPU, CUDA)
)
def test_wild_offsets_of_bins_read_zero(case: Case, bad: float) -> None:
    operands = case.operands()
    operands["offset"][:, :, 1] = bad
    operands["rois"][0] = torch.tensor([0, 4.0, 4.0, 36.0, 28.0])
    found = results(case.operator, case.sample, operands)
    assert not found["output"][:, :, 1].any() and found["output"][0, :, 0].all()
    assert all(bool(torch.isfinite(t).all()) for t in found.values())
    assert not found["offset"][:, :, 1].any()


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [((1, 1), torch.float32), ((32, 4), torch.float32), ((4, 40), torch.bfloat16)],
    ids=["cpu", "grouped", "tiled"],
)
def test_positions_outside_do_not_touch_infinities(weight: tuple[int, int], dtype: torch.dtype) -> None:
    channels = 32 if weight == (32, 4) else weight[1]
    image = torch.full((1, channels, 3, 3), float("inf"), dtype=dtype)
    offset = torch.full((1, 2, 3, 3), -5.0, dtype=dtype)
    assert not deform_conv2d(image, offset, torch.ones(*weight, 1, 1, dtype=dtype)).any()


@pytest.mark.parametrize("bad", NOT_FINITE[:2], ids=str)
def test_bad_pixels_stay_in_their_group(bad: float) -> None:
    sample = replace(grouped("bad_pixels", 4, 8), spread=0.5)
    operands = sample.tensors(torch.float32)
    expected = results("deform_conv2d", sample, operands)
    operands["input"][:, 5] = bad  # of the second group
    actual = results("deform_conv2d", sample, operands)
    others = torch.tensor([c for c in range(32) if not 4 <= c < 8])
    for name in ("output", "input", "weight"):
        axis = 0 if name == "weight" else 1
        assert torch.equal(actual[name].index_select(axis, others), expected[name].index_select(axis, others)), name
    assert not bool(actual["output"][:, 4:8].isfinite().all())


@pytest.mark.parametrize("bad", NOT_FINITE, ids=str)
def test_bad_pixels_come_through(bad: float) -> None:
    """Only in the sums that read them, and with the same value in bfloat16 as in float32."""
    image = torch.ones(1, 40, 4, 4, dtype=torch.bfloat16)
    image[0, 3, 1, 2] = bad
    offset, weight = torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16), torch.ones(5, 40, 1, 1, dtype=torch.bfloat16)
    offset[:] = 0.25  # a whole number would read a pixel with weight 0, which makes NaN of infinity
    output = deform_conv2d(image, offset, weight)
    single = deform_conv2d(image.float(), offset.float(), weight.float())
    assert bool(output.isfinite().logical_not().any())
    assert torch.equal(output.isnan(), single.isnan())
    assert torch.equal(output.isinf(), single.isinf())


def test_infinite_gradients_stay_inside() -> None:
    """The places outside the image belong to no pixel: what flows there must not come back at samples of pixels."""
    image, weight = torch.ones(1, 32, 2, 2, requires_grad=True), torch.ones(32, 4, 1, 1)
    offset = torch.zeros(1, 2, 2, 2)
    offset[..., 0, 0] = -0.5  # the first sample reads one pixel, and three places outside
    grad = torch.zeros(1, 32, 2, 2)
    grad[..., 0, 0] = float("inf")
    (found,) = torch.autograd.grad(deform_conv2d(image, offset, weight), image, grad)
    assert bool(found[..., 0, 0].isinf().all())
    assert not found.flatten(2)[..., 1:].any()


@pytest.mark.parametrize("place", [1, 2, 3, 4])
@pytest.mark.parametrize("bad", NOT_FINITE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", ["compiled", "reference"])
@pytest.mark.parametrize("operator", POOLINGS)
def test_rois_that_are_not_finite_give_zero(
    operator: str, path: str, dtype: torch.dtype, bad: float, place: int
) -> None:
    """In outputs and in all gradients, of the fallback too; the other RoIs are not touched."""
    sample = RoiSample("wild", rois=((0, 2.3, 3.1, 40.7, 33.9), (1, 8.0, 7.5, 30.0, 28.25)))
    operands = sample.tensors(dtype)
    operands["rois"][1, place] = bad
    function = getattr(dcn_d2.ops if path == "compiled" else reference, operator)
    for geometry in ({}, {"sampling_ratio": 2}) if operator == "deform_roi_pool" else ({},):

        def call(geometry: dict[str, Any] = geometry, **tensors: Any) -> Tensor:
            return function(**tensors, **sample.arguments, **geometry)

        found = gradients(call, operands)
        assert not any(found[key][1].any() for key in ("output", "offset", "mask", "input"))
        assert found["output"][0].all() and found["offset"][0].any()
        assert all(bool(torch.isfinite(t).all()) for t in found.values())


NAN, INF = float("nan"), float("inf")
NOWHERE = [(0, NAN, 1, 5, 5), (0, 1, NAN, 5, 5), (0, 1, 1, INF, 5), (0, INF, 1, INF, 5), (0, -INF, -INF, INF, INF)]
NO_AREA = [(0, 5, 5, 5, 5), (0, 9, 9, 3, 3)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "rois"), [("deform_roi_pool", NOWHERE + NO_AREA), ("deform_psroi_pool", NOWHERE)])
def test_rois_without_area_or_not_finite_give_zero(operator: str, rois: list[Any], device: str) -> None:
    sample = RoiSample("nowhere", rois=tuple(rois))
    found = results(operator, sample, sample.tensors(torch.float32, device))
    assert not found["output"].any() and not found["input"].any() and not found["offset"].any()
