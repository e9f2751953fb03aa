# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable layers must not look cheaper than the plain ones that they replace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dcn_d2.layers import DeformConvPack, ModulatedDeformConvPack
from dcn_d2.ops import deform_conv2d, deform_psroi_pool, deform_roi_pool, modulated_deform_conv2d


def flops(function: object, *arguments: object) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments)  # type: ignore[operator]
    return counter.get_total_flops()


GEOMETRY = {"kernel_size": (3, 2), "stride": (2, 1), "padding": 1}
SAMPLING = 2 * 4 * 2 * (4 * 10) * 8 * 6  # of 2 images, 4 x 10 positions, 8 channels, 6 taps


@pytest.mark.parametrize(("layer_class", "channels_per_tap"), [(DeformConvPack, 2), (ModulatedDeformConvPack, 3)])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_deformable_layer_costs_its_branch_and_the_interpolation_more(
    layer_class: type[nn.Module], channels_per_tap: int, groups: int
) -> None:
    x = torch.randn(2, 8, 7, 9)
    plain = nn.Conv2d(8, 12, groups=groups, **GEOMETRY)
    branch = nn.Conv2d(8, channels_per_tap * 6, **GEOMETRY)
    assert plain(x).shape[2:] == (4, 10)
    layer = layer_class(8, 12, groups=groups, **GEOMETRY)
    assert flops(layer, x) == flops(plain, x) + flops(branch, x) + SAMPLING


@pytest.mark.parametrize("modulated", [False, True])
def test_backward_costs_two_products_and_sampling_again(modulated: bool) -> None:
    operator = modulated_deform_conv2d if modulated else deform_conv2d
    operands = [torch.randn(2, 8, 7, 9), torch.randn(2, 18 if modulated else 12, 4, 10), torch.randn(12, 8, 3, 2)]
    product = flops(torch.conv2d, operands[0], operands[2], None, (2, 1), 1)

    def backward(*needed: bool) -> int:
        leaves = [t.clone().requires_grad_(need) for t, need in zip(operands, needed)]
        return flops(operator(*leaves, None, (2, 1), 1).sum().backward)

    assert backward(True, True, True) == 2 * product + 4 * SAMPLING
    assert backward(False, False, True) == product + SAMPLING
    assert backward(True, False, False) == product + SAMPLING
    assert backward(False, True, False) == product + 2 * SAMPLING


def test_pooling_costs_its_interpolation() -> None:
    x, rois = torch.randn(1, 5, 9, 9, requires_grad=True), torch.tensor([[0, 1.0, 1, 7, 6]] * 3)
    bins = 3 * 5 * 2 * 4  # RoIs, channels, bins
    assert flops(lambda: deform_roi_pool(x, rois, None, (2, 4), sampling_ratio=3)) == 2 * 4 * bins * 9
    assert flops(lambda: deform_roi_pool(x, rois, None, (2, 4))) == 2 * 4 * bins * 4
    assert flops(lambda: deform_psroi_pool(x, rois, None, (2, 4))) == 2 * 4 * bins * 16
    for operator, samples in ((deform_roi_pool, 4), (deform_psroi_pool, 16)):
        output = operator(x, rois, torch.zeros(3, 2, 2, 4, requires_grad=True), (2, 4))
        assert flops(output.sum().backward) == 2 * 3 * 4 * bins * samples
