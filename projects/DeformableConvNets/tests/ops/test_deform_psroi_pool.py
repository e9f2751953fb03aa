# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What only deform_psroi_pool has: numbers by hand, how corners round, and channels that belong to bins."""

from __future__ import annotations

import pytest
import torch

from dcn_d2.ops import deform_psroi_pool


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
