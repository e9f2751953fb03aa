# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable RoI pooling operators against implementations that share nothing with them, in value and gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.parity import pooling
from dcn_d2 import ops

SCALE = 1 / 16


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A map of two images, RoIs of all sizes that partly lie outside, offsets (x, y) and a mask."""
    generator = torch.Generator().manual_seed(7)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    corner = uniform(60, 2) * torch.tensor([600.0, 400.0]) - 50
    size = uniform(60, 2) ** 2 * torch.tensor([400.0, 300.0])
    corner[0], size[0] = torch.tensor([12.5, 31.5]), torch.tensor([40.0, 60.0])  # rounds away from zero, not to even
    size[1] = 0
    rois = torch.cat([torch.arange(60)[:, None] % 2, corner, corner + size], 1)
    values = (2 * uniform(2, 6, 25, 38) - 1, rois, 4 * uniform(60, 2, 7, 7) - 2, uniform(60, 1, 7, 7))
    return tuple(value.to(dtype) for value in values)  # type: ignore[return-value]


@pytest.mark.parametrize("with_mask", [False, True], ids=["plain", "modulated"])
@pytest.mark.parametrize("with_offset", [False, True], ids=["undeformed", "deformed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-4)], ids=["f64", "f32"])
@pytest.mark.parametrize(
    ("operator", "independent"),
    [(ops.deform_psroi_pool, pooling.original), (ops.deform_roi_pool, pooling.aligned)],
    ids=["original", "aligned"],
)
def test_operator_equals_independent_implementation(
    operator: Callable[..., Tensor],
    independent: Callable[..., Tensor],
    dtype: torch.dtype,
    tolerance: float,
    with_offset: bool,
    with_mask: bool,
) -> None:
    feature, rois, offset, mask = operands(dtype)
    moving = [t for t, wanted in ((feature, True), (offset, with_offset), (mask, with_mask)) if wanted]
    for tensor in moving:
        tensor.requires_grad_()
    used_offset, used_mask = offset if with_offset else None, mask if with_mask else None

    ours = operator(feature, rois, used_offset, 7, SCALE, mask=used_mask)
    theirs = independent(feature, rois, used_offset, 7, SCALE) * (mask if with_mask else 1)
    grad = torch.linspace(-1, 1, ours.numel()).reshape(ours.shape).to(dtype)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert float(ours.detach().std()) > 0.05
    for our_grad, their_grad in zip(torch.autograd.grad(ours, moving, grad), torch.autograd.grad(theirs, moving, grad)):
        torch.testing.assert_close(our_grad, their_grad, rtol=tolerance, atol=tolerance)


def test_the_two_poolings_differ() -> None:
    """They take the same parameters, so other tests would not notice if one replaced the other."""
    feature, rois, offset, _ = operands(torch.float64)
    ours = ops.deform_psroi_pool(feature, rois, offset, 7, SCALE)
    assert float((ours - ops.deform_roi_pool(feature, rois, offset, 7, SCALE)).abs().mean()) > 0.05
