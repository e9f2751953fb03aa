# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What only modulated_deform_conv2d has: logits, and going in parts where there is no kernel of the whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dcn_d2.ops import modulated_deform_conv2d

from .paths import DEVICES
from .samples import MODULATED_SAMPLES, operands_of

parametrize_devices = pytest.mark.parametrize("device", DEVICES)


@parametrize_devices
def test_logits_of_any_size(device: str) -> None:
    # A pixel of 1 under every tap and a weight of 1 leave the modulation itself.
    values = [-torch.inf, -1e30, -100.0, -87.5, -80.0, -20.0, -1e-7, 0.0, 1e-7, 0.5, 20.0, 87.5, 1e30, torch.inf]
    spread = torch.linspace(-90, 90, 10007)
    logits = torch.cat([torch.tensor(values), spread]).reshape(1, 1, 1, -1)
    offset_and_mask = torch.cat([torch.zeros(1, 2, 1, logits.numel()), logits], dim=1).to(device)
    ones = torch.ones(1, 1, 1, logits.numel(), device=device)
    found = modulated_deform_conv2d(ones, offset_and_mask, torch.ones(1, 1, 1, 1, device=device)).cpu()
    expected = logits.double().sigmoid().float()
    normal = logits >= -87  # below them the modulation is zero, up to the smallest normal numbers
    torch.testing.assert_close(found[normal], expected[normal], rtol=3e-7 if device == "cpu" else 6e-7, atol=0)
    torch.testing.assert_close(found[~normal], expected[~normal], rtol=0, atol=2e-38)


@parametrize_devices
def test_a_logit_that_is_not_a_number_shows(device: str) -> None:
    offset_and_mask = torch.zeros(1, 3, 1, 2, device=device)
    offset_and_mask[0, 2, 0, 1] = torch.nan
    ones = torch.ones(1, 1, 1, 2, device=device)
    found = modulated_deform_conv2d(ones, offset_and_mask, ones[..., :1])
    assert found[0, 0, 0, 0] == 0.5 and found[0, 0, 0, 1].isnan()


def test_devices_without_a_kernel_go_in_parts() -> None:
    # As CUDA does where no kernel of the whole is compiled.
    whole = torch.ops.dcn_d2.modulated_deform_conv2d.default
    backward = torch.ops.dcn_d2.modulated_deform_conv2d_backward.default
    sample = dataclasses.replace(MODULATED_SAMPLES[0], bias=False)
    operands = operands_of("modulated_deform_conv2d", sample)
    arguments = (operands["input"], operands["offset_and_mask"], operands["weight"])
    geometry = tuple(sample.geometry.values())
    in_parts = torch._C.DispatchKey.CompositeExplicitAutograd
    grad = torch.randn(whole(*arguments, None, *geometry).shape, dtype=torch.float64)
    actual = whole._op_dk(in_parts, *arguments, None, *geometry)
    torch.testing.assert_close(actual, whole(*arguments, None, *geometry))
    needed = (True, True, True)
    for a, b in zip(
        backward._op_dk(in_parts, grad, *arguments, *geometry, *needed), backward(grad, *arguments, *geometry, *needed)
    ):
        torch.testing.assert_close(a, b)
