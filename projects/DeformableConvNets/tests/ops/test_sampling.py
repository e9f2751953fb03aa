# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Where samples fall and what they read, with numbers computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dcn_d2.ops.sampling import (
    bilinear_clamped,
    bilinear_half_pixel,
    bilinear_zeros,
    deform_conv2d_locations,
    psroi_bin_locations,
    roi_bin_locations,
)


def test_zero_offsets_give_the_taps_of_a_plain_convolution() -> None:
    offset = torch.zeros(1, 2 * 6, 3, 4)
    where = deform_conv2d_locations(offset, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    assert where.shape == (1, 1, 6, 3, 4, 2)
    assert where[0, 0, 0, 0, 0].tolist() == [-1, 0]  # first tap of the first output
    assert where[0, 0, 5, 0, 0].tolist() == [1, 2]  # last tap: two rows and one dilated column on
    assert where[0, 0, 0, 2, 3].tolist() == [3, 3]  # stride 2 in y, 1 in x


def test_offsets_are_y_then_x_tap_by_tap_and_group_by_group() -> None:
    offset = torch.arange(2 * 2 * 4.0).reshape(1, 16, 1, 1).expand(1, 16, 2, 2)
    where = deform_conv2d_locations(offset, 2)
    base = deform_conv2d_locations(torch.zeros(1, 16, 2, 2), 2)
    assert (where - base)[0, :, :, 0, 0].reshape(-1).tolist() == list(range(16))


def test_wrong_offset_channels() -> None:
    with pytest.raises(ValueError, match=r"offset has 17 channels, but needs a multiple of 2 \* 3 \* 3 = 18"):
        deform_conv2d_locations(torch.zeros(1, 17, 2, 2), 3)


def test_bins_are_centred_and_shifted_by_fractions_of_the_roi() -> None:
    roi = torch.tensor([2.0, 4.0, 10.0, 8.0])  # 8 wide, 4 high
    shift = torch.zeros(2, 2, 2)
    shift[0, 0, 1] = 0.5  # x of the bin in row 0, column 1
    y, x = roi_bin_locations(roi, shift, 1.0, 2)
    assert y.shape == x.shape == (2, 2, 2)
    assert y[0, 0].tolist() == [4.0, 5.0] and y[1, 0].tolist() == [6.0, 7.0]
    assert x[1, 0].tolist() == [2.5, 4.5] and x[1, 1].tolist() == [6.5, 8.5]
    assert x[0, 1].tolist() == [10.5, 12.5] and torch.equal(y[0, 1], y[0, 0])
    assert roi_bin_locations(roi, shift, 1.0, 0)[1].shape == (2, 2, 4)  # bins 4 wide take 4 samples


def test_bins_of_position_sensitive_pooling_have_their_samples_on_upper_left_edges() -> None:
    # Corners are rounded, half away from zero, and include the last pixel: x from 2 to 9 + 1, y from -1 to 2 + 1.
    # Half a pixel is taken off after the scaling: x from 0.5 to 4.5, y from -1 to 1.
    roi = torch.tensor([1.5, -0.5, 9.4, 2.4])
    offset = torch.zeros(2, 1, 2)
    offset[0, 0, 1], offset[1, 0, 1] = 1.0, 2.0  # of the bin in column 1
    y, x = psroi_bin_locations(roi, offset, 0.5, 2, 0.25)
    assert y.shape == x.shape == (1, 2, 2)
    assert y[0, 0].tolist() == [-1, 0] and x[0, 0].tolist() == [0.5, 1.5]  # parts are 1 high and 1 wide
    assert y[0, 1].tolist() == [0, 1], "moved by 2 * 0.25 of a height of 2"
    assert x[0, 1].tolist() == [3.5, 4.5], "2.5 and 3.5, moved by 1 * 0.25 of a width of 4"


def test_a_roi_of_position_sensitive_pooling_is_at_least_a_tenth_of_a_pixel_long() -> None:
    roi = torch.tensor([8.0, 8.0, 3.0, 7.0], dtype=torch.float64)  # ends before it begins
    y, x = psroi_bin_locations(roi, torch.zeros(2, 2, 2, dtype=torch.float64), 1.0, 1, 0.1)
    expected = torch.tensor([7.5, 7.55], dtype=torch.float64)
    torch.testing.assert_close(y[:, 0, 0], expected)
    torch.testing.assert_close(x[0, :, 0], expected)
    roi[2] = torch.inf
    y, x = psroi_bin_locations(roi, torch.zeros(2, 2, 2, dtype=torch.float64), 1.0, 1, 0.1)
    assert x.isnan().all() and not y.isnan().any()


IMAGE = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
POSITIONS = torch.tensor([-1.0, -0.6, -0.5, 0.0, 0.25, 1.0, 1.5, 1.6, 2.0, 2.5, float("nan")])
BORDER_RULES = {
    # Weights of what lies outside are lost; the sample at -1 has none left.
    bilinear_zeros: [0, 0.4, 0.5, 1, 1.5, 3, 1.5, 1.2, 0, 0, 0],
    # Whole values in a strip of one pixel around the map.
    bilinear_clamped: [1, 1, 1, 1, 1.5, 3, 3, 3, 3, 0, 0],
    # The same in a strip of half a pixel.
    bilinear_half_pixel: [0, 0, 1, 1, 1.5, 3, 3, 0, 0, 0, 0],
}


@pytest.mark.parametrize("axis", ["y", "x"])
@pytest.mark.parametrize("rule", BORDER_RULES)
def test_the_three_border_rules(rule: Callable[..., Any], axis: str) -> None:
    image = IMAGE if axis == "y" else IMAGE.transpose(1, 2)
    across = torch.zeros_like(POSITIONS)
    found = rule(image, *((POSITIONS, across) if axis == "y" else (across, POSITIONS)))
    expected = BORDER_RULES[rule]
    if rule is bilinear_half_pixel:
        found, inside = found
        assert inside.tolist() == [value > 0 for value in expected]
    torch.testing.assert_close(found[0], torch.tensor(expected))


def test_samples_between_pixels_mix_four_of_them() -> None:
    y, x = torch.tensor([0.5]), torch.tensor([0.25])
    assert bilinear_zeros(IMAGE, y, x).item() == bilinear_clamped(IMAGE, y, x).item() == 2.25
    assert bilinear_half_pixel(IMAGE, y, x)[0].item() == 2.25


def test_half_pixel_derivatives_are_zero_on_pixels_and_in_the_border_strip() -> None:
    y = torch.tensor([-0.25, 0.0, 0.5, 1.0, 1.25, 1.75], requires_grad=True)
    values, _ = bilinear_half_pixel(IMAGE, y, torch.zeros(6))
    values.sum().backward()
    assert y.grad is not None and y.grad.tolist() == [0, 0, 2, 0, 0, 0]
