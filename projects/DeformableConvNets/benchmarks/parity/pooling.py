# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The two deformable RoI poolings once more, from their formulas and without dcn_d2, differentiable by autograd.

mmcv has no CPU kernel of them. Put under MMDetection's modules these functions make the dpool and mdpool models run on
CPU; and the operators of dcn_d2 are compared with them in value and gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _corners(feature: Tensor, image: Tensor, y0: Tensor, y1: Tensor, x0: Tensor, x1: Tensor) -> list[Tensor]:
    """Values at the four corners of every sample, (..., C); `image` says which image a sample reads."""
    _, channels, height, width = feature.shape
    rows = feature.permute(0, 2, 3, 1).reshape(-1, channels)
    start = image * (height * width)
    return [rows[(start + y * width + x).long()] for y in (y0, y1) for x in (x0, x1)]


def _round(x: Tensor) -> Tensor:
    """To the nearest integer, halves away from zero as C's round()."""
    return x.sign() * (x.abs() + 0.5).floor()


def original(
    feature: Tensor, rois: Tensor, offset: Tensor | None, bins: int, scale: float, trans_std: float = 0.1, k: int = 4
) -> Tensor:
    """The pooling of DCNv1's authors, with one group: rounded RoIs, k x k samples a bin, those off the map left out.

    Args:
        feature: (N, C, H, W).
        rois: (R, 5) of (image, x0, y0, x1, y1).
        offset: (R, 2, bins, bins), x before y, or None.
        bins: bins a side.
        scale: map pixels per image pixel.
        trans_std: factor of the offsets.
        k: samples a side of a bin.

    Returns:
        (R, C, bins, bins).
    """
    height, width = feature.shape[2:]
    steps, parts = torch.arange(bins).to(rois), torch.arange(k).to(rois)

    def positions(low: Tensor, high: Tensor, shift: Tensor) -> Tensor:
        """Samples along one axis: low and high are (R,), shift (R, bins along this axis, bins along the other)."""
        start = _round(low) * scale - 0.5
        size = ((_round(high) + 1) * scale - 0.5 - start).clamp(min=0.1)
        left = (
            start[:, None, None]
            + steps[:, None] * (size / bins)[:, None, None]
            + trans_std * shift * size[:, None, None]
        )
        return left[..., None] + parts * (size / bins / k)[:, None, None, None]

    pooled = []
    for piece in range(0, len(rois), 100):  # in pieces: all samples of 1000 RoIs would take gigabytes
        roi = rois[piece : piece + 100]
        shift = roi.new_zeros(len(roi), 2, bins, bins) if offset is None else offset[piece : piece + 100]
        x = positions(roi[:, 1], roi[:, 3], shift[:, 0].transpose(1, 2)).transpose(1, 2)  # (R, ph, pw, k)
        y = positions(roi[:, 2], roi[:, 4], shift[:, 1])
        y, x = torch.broadcast_tensors(y[..., :, None], x[..., None, :])  # (R, ph, pw, k, k)
        kept = (y >= -0.5) & (y <= height - 0.5) & (x >= -0.5) & (x <= width - 0.5)
        y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
        y0, x0 = y.detach().floor(), x.detach().floor()
        image = roi[:, 0, None, None, None, None].expand_as(x)
        v00, v01, v10, v11 = _corners(feature, image, y0, y.detach().ceil(), x0, x.detach().ceil())
        wy, wx = (y - y0)[..., None], (x - x0)[..., None]
        value = (1 - wy) * ((1 - wx) * v00 + wx * v01) + wy * ((1 - wx) * v10 + wx * v11)
        total = (value * kept[..., None]).sum((-3, -2))
        pooled.append((total / kept.sum((-2, -1)).clamp(min=1)[..., None]).permute(0, 3, 1, 2))
    return torch.cat(pooled) if pooled else feature.new_zeros(0, feature.shape[1], bins, bins)


def aligned(
    feature: Tensor, rois: Tensor, offset: Tensor | None, bins: int, scale: float, gamma: float = 0.1
) -> Tensor:
    """The pooling of mmcv's `deform_roi_pool` with adaptive sampling: RoIAlign whose bins move.

    Arguments as for `original`. The derivative is the true one; mmcv's differs from it for samples outside the
    outermost pixel centres.
    """
    height, width = feature.shape[2:]
    steps = torch.arange(bins).to(rois)
    offset = rois.new_zeros(len(rois), 2, bins, bins) if offset is None else offset
    start = rois[:, 1:3] * scale - 0.5
    size = rois[:, 3:5] * scale - 0.5 - start
    grids = (size / bins).ceil().long()  # x, y
    pooled: list[Tensor] = [feature.new_zeros(feature.shape[1], bins, bins)] * len(rois)

    def corners_of(position: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Neighbours along an axis, the weight of the upper one, and whether the sample counts."""
        inside = (position >= -1) & (position <= limit)
        clamped = position.clamp(0, limit - 1)
        low = clamped.detach().floor()
        return low, (low + 1).clamp(max=limit - 1), clamped - low, inside

    for grid in grids.unique(dim=0):
        if (grid <= 0).any():
            continue  # a RoI of no width or height has no samples
        nx, ny = grid.tolist()
        for which in (grids == grid).all(1).nonzero().flatten().split(max(1, 1600 // (nx * ny))):
            (x_start, y_start), (x_size, y_size) = start[which].T, size[which].T
            shift = gamma * offset[which] * size[which][:, :, None, None]
            x_parts, y_parts = (torch.arange(nx).to(rois) + 0.5) / nx, (torch.arange(ny).to(rois) + 0.5) / ny
            x = x_start[:, None, None] + (steps[:, None] + x_parts) * (x_size / bins)[:, None, None]  # (R, pw, nx)
            y = y_start[:, None, None] + (steps[:, None] + y_parts) * (y_size / bins)[:, None, None]
            x = x[:, None, :, None, :] + shift[:, 0, :, :, None, None]  # (R, ph, pw, 1, nx)
            y = y[:, :, None, :, None] + shift[:, 1, :, :, None, None]
            y, x = torch.broadcast_tensors(y, x)
            y0, y1, wy, y_in = corners_of(y, height)
            x0, x1, wx, x_in = corners_of(x, width)
            image = rois[which, 0][:, None, None, None, None].expand_as(x)
            v00, v01, v10, v11 = _corners(feature, image, y0, y1, x0, x1)
            wy, wx = wy[..., None], wx[..., None]
            value = (1 - wy) * ((1 - wx) * v00 + wx * v01) + wy * ((1 - wx) * v10 + wx * v11)
            mean = (value * (y_in & x_in)[..., None]).sum((-3, -2)) / (nx * ny)
            for index, result in zip(which.tolist(), mean.permute(0, 3, 1, 2)):
                pooled[index] = result
    return torch.stack(pooled) if pooled else feature.new_zeros(0, feature.shape[1], bins, bins)
