# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from dcn_d2.ops.sampling import bilinear_clamped, bilinear_zeros, deform_conv2d_locations, roi_bin_locations


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


def test_the_two_border_rules() -> None:
    image = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    positions = torch.tensor([-1.0, -0.5, 0.0, 1.0, 1.5, 2.0, 2.5, float("nan")])
    column = torch.zeros_like(positions)
    assert bilinear_zeros(image, positions, column)[0].tolist() == [0, 0.5, 1, 3, 1.5, 0, 0, 0]
    assert bilinear_clamped(image, positions, column)[0].tolist() == [1, 1, 1, 3, 3, 3, 0, 0]
