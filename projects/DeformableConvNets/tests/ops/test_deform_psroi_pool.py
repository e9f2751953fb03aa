# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What is special to deform_psroi_pool; the rest is in test_roi_pools.py."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcn_d2.ops import deform_psroi_pool

from .samples import DEVICES, RoiSample, assert_same, gradients
from .test_roi_pools import compiled as any_compiled
from .test_roi_pools import oracle as any_oracle

compiled = functools.partial(any_compiled, "deform_psroi_pool")
oracle = functools.partial(any_oracle, "deform_psroi_pool")
parametrize_devices = pytest.mark.parametrize("device", DEVICES)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    # Odd eighths: a sample never falls exactly on a bound of the map, where rounding decides whether it counts.
    coordinate = st.integers(-120, 240).map(lambda n: (2 * n + 1) / 8)
    batch, group_size, classes = number(1, 3), number(1, 3), number(1, 2)
    channels, part_size = classes * number(1, 20), (number(1, 4), number(1, 4))
    sample = RoiSample(
        "any",
        batch=batch,
        channels=channels,
        input_channels=channels * group_size**2,
        size=(number(1, 9), number(1, 9)),
        output_size=(number(1, 4), number(1, 4)),
        spatial_scale=data.draw(st.sampled_from([1.0, 0.5, 0.0625])),
        offset_shape=(2 * classes, *part_size),
        geometry={
            "group_size": group_size,
            "part_size": part_size,
            "sample_per_part": number(1, 5),
            "trans_std": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        },
        offset=data.draw(st.booleans()),
        mask=data.draw(st.booleans()),
        rois=tuple((number(0, batch - 1), *(data.draw(coordinate) for _ in range(4))) for _ in range(number(0, 3))),
    )
    operands = sample.tensors(seed=number(0, 9))
    expected = gradients(functools.partial(oracle, sample), operands)
    assert_same(gradients(functools.partial(compiled, sample), operands), expected, 1e-10)


def test_hand_checkable_numbers() -> None:
    image = torch.arange(64.0).reshape(1, 1, 8, 8)  # value 8y + x
    rois = torch.tensor([[0, 1.2, 1.8, 4.0, 3.4]])  # rounds to (1, 2, 4, 3): 4 wide and 2 high, the last one included
    plain = deform_psroi_pool(image, rois, None, (1, 1))
    # Samples at 0.5 + (0, 1, 2, 3) in x and 1.5 + (0, 0.5, 1, 1.5) in y.
    assert plain.item() == pytest.approx(8 * 2.25 + 2.0)
    offset = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)  # in x, then in y
    moved = deform_psroi_pool(image, rois, offset, (1, 1), trans_std=0.1)
    assert moved.item() == pytest.approx(plain.item() + 0.1 * 4 * 1 + 8 * 0.1 * 2 * 2, rel=1e-6)
    masked = deform_psroi_pool(image, rois, offset, (1, 1), mask=torch.full((1, 1, 1, 1), 0.25))
    assert masked.item() == pytest.approx(moved.item() / 4)


def test_samples_off_the_map_do_not_count() -> None:
    image = torch.ones(1, 1, 4, 4)
    inside_and_outside = torch.tensor([[0, -8.0, -8.0, 3.0, 3.0], [0, 50.0, 50.0, 60.0, 60.0]])
    output = deform_psroi_pool(image, inside_and_outside, None, (1, 1))
    assert output.flatten().tolist() == [1.0, 0.0]  # the mean of those on the map; nothing where there is none


def test_corners_round_half_away_from_zero() -> None:
    image = torch.arange(12.0).reshape(1, 1, 1, 12).expand(1, 1, 12, 12)
    for corner, rounded in ((2.5, 3.0), (3.5, 4.0), (4.4, 4.0)):
        rois = torch.tensor([[0, corner, 2, 9, 9], [0, rounded, 2, 9, 9]])
        output = deform_psroi_pool(image, rois, None, (1, 1))
        assert output[0] == output[1]


def test_position_sensitive_bins_read_channels_of_their_own() -> None:
    image = torch.arange(8.0)[:, None, None].expand(8, 5, 5)[None]  # channel k has value k
    output = deform_psroi_pool(image, torch.tensor([[0, 1.0, 1.0, 3.0, 3.0]]), None, (2, 2), group_size=2)
    assert output[0].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@parametrize_devices
def test_rois_not_finite_give_zero(device: str) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [(0, nan, 1, 5, 5), (0, 1, nan, 5, 5), (0, -inf, -inf, inf, inf), (0, inf, 1, inf, 5)]
    sample = RoiSample("empty", rois=tuple(rows))
    found = gradients(functools.partial(compiled, sample), sample.tensors(torch.float32, device))
    assert not found["output"].any() and not found["input"].any() and not found["offset"].any()
