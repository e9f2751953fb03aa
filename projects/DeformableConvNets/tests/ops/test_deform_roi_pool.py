# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What is special to deform_roi_pool; the rest is in test_roi_pools.py."""

import functools

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from dcn_d2.ops import deform_roi_pool

from .samples import DEVICES, RoiSample, assert_same, gradients
from .test_roi_pools import compiled as any_compiled
from .test_roi_pools import oracle as any_oracle

compiled = functools.partial(any_compiled, "deform_roi_pool")
oracle = functools.partial(any_oracle, "deform_roi_pool")
parametrize_devices = pytest.mark.parametrize("device", DEVICES)


@parametrize_devices
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 5])
def test_zero_offset_equals_torchvision_roi_align(sampling_ratio: int, device: str) -> None:
    sample = RoiSample("align", geometry={"sampling_ratio": sampling_ratio})
    operands = sample.tensors(torch.float64, device)
    expected = torchvision.ops.roi_align(
        operands["input"], operands["rois"], (3, 2), sample.spatial_scale, sampling_ratio, aligned=True
    )
    for offset in (None, torch.zeros_like(operands["offset"])):
        actual = deform_roi_pool(operands["input"], operands["rois"], offset, **sample.arguments)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    coordinate = st.floats(-30, 60, width=16)
    batch = number(1, 3)
    sample = RoiSample(
        "any",
        batch=batch,
        channels=number(1, 20),
        size=(number(1, 9), number(1, 9)),
        output_size=(number(1, 4), number(1, 4)),
        spatial_scale=data.draw(st.sampled_from([1.0, 0.5, 0.0625])),
        geometry={"sampling_ratio": number(0, 3), "gamma": data.draw(st.sampled_from([0.0, 0.1, 1.0]))},
        offset=data.draw(st.booleans()),
        mask=data.draw(st.booleans()),
        rois=tuple((number(0, batch - 1), *(data.draw(coordinate) for _ in range(4))) for _ in range(number(0, 3))),
    )
    operands = sample.tensors(seed=number(0, 9))
    expected = gradients(functools.partial(oracle, sample), operands)
    assert_same(gradients(functools.partial(compiled, sample), operands), expected, 1e-10)


def test_hand_checkable_numbers() -> None:
    image = torch.arange(64.0).reshape(1, 1, 8, 8)  # value 8y + x
    rois = torch.tensor([[0, 1.0, 2.0, 5.0, 4.0]])  # 4 wide, 2 high
    plain = deform_roi_pool(image, rois, None, (1, 1))
    assert plain.item() == pytest.approx(8 * 2.5 + 2.5)  # the RoI's centre (3, 3) less half a pixel
    offset = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)  # in x, then in y
    moved = deform_roi_pool(image, rois, offset, (1, 1), gamma=0.1)
    assert moved.item() == pytest.approx(plain.item() + 0.1 * 4 * 1 + 8 * 0.1 * 2 * 2, rel=1e-6)
    masked = deform_roi_pool(image, rois, offset, (1, 1), gamma=0.1, mask=torch.full((1, 1, 1, 1), 0.25))
    assert masked.item() == pytest.approx(moved.item() / 4)


@parametrize_devices
def test_rois_without_area_or_not_finite_give_zero(device: str) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [(0, 5, 5, 5, 5), (0, 9, 9, 3, 3), (0, nan, 1, 5, 5), (0, 1, 1, inf, 5), (0, -inf, -inf, inf, inf)]
    sample = RoiSample("empty", rois=tuple(rows))
    found = gradients(functools.partial(compiled, sample), sample.tensors(torch.float32, device))
    assert not found["output"].any() and not found["input"].any() and not found["offset"].any()


@parametrize_devices
def test_a_roi_far_larger_than_the_map_takes_no_time(device: str) -> None:
    image = torch.ones(1, 2, 6, 5, device=device)
    rois = torch.tensor([[0, -1e12, -1e12, 1e12, 1e12]], device=device)
    assert deform_roi_pool(image, rois, None, (3, 3)).abs().max() < 1e-6  # all but a few samples are off the map
