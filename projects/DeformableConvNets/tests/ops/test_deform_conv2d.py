# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What only deform_conv2d has: numbers by hand, and the border rule of its offset gradient."""

from __future__ import annotations

import torch

from dcn_d2.ops import deform_conv2d


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
