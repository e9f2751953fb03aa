# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What only deform_roi_pool has: numbers by hand, and RoIs of any size."""

from __future__ import annotations

import pytest
import torch

from dcn_d2.ops import deform_roi_pool, reference

from .paths import DEVICES


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


@pytest.mark.parametrize("device", DEVICES)
def test_a_roi_far_larger_than_the_map_takes_no_time(device: str) -> None:
    image = torch.ones(1, 2, 6, 5, device=device)
    rois = torch.tensor([[0, -1e12, -1e12, 1e12, 1e12]], device=device)
    assert deform_roi_pool(image, rois, None, (3, 3)).abs().max() < 1e-6  # all but a few samples are off the map


def test_a_roi_of_no_area_is_a_point_for_a_fixed_grid() -> None:
    """As in mmcv; where the grid follows the RoI's size it has no samples, and the output is zero."""
    image = torch.arange(25.0).reshape(1, 1, 5, 5)  # 5 y + x
    rois = torch.tensor([[0, 2.5, 1.5, 2.5, 1.5]])  # pixel (1, 2) after the shift by a half
    for pool in (deform_roi_pool, reference.deform_roi_pool):
        assert pool(image, rois, None, (1, 1), sampling_ratio=2).item() == 7
        assert pool(image, rois, None, (1, 1)).item() == 0
