# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The RoI pooling operators made of operators that other runtimes know: RoIAlign, gathers and matrix products.

Exported graphs hold these in place of the operators; `dcn_d2.ops.portable` says when. Nothing here depends on values or
on the number of RoIs in Python, so that one graph serves any number, also none. Only the forward pass is of use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reference import _float_of_half

# A box whose samples must read nothing goes from here to one pixel further. RoIAlign reads nothing more than a pixel
# outside the map. A box of no size would read nothing too, but it is NaN in OpenVINO.
_OUTSIDE = -5.0


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    """Computes `dcn_d2.ops.deform_roi_pool`, which says what the arguments are, with RoIAlign.

    Without offsets it is RoIAlign. With them, every bin becomes a RoI of one bin, moved by its offset. So the number of
    samples may follow from the size of the RoI without a loop in the graph. It is not bounded by the size of the map,
    as the operator's is: a RoI of a million pixels takes forever. Detectors clip their boxes to the image.
    """
    dtype = input.dtype
    input, rois, offset, mask = map(_float_of_half, (input, rois, offset, mask))
    rois = rois.to(input.dtype)
    start = rois[:, 1:3] * spatial_scale - 0.5
    size = (rois[:, 3:5] * spatial_scale - 0.5) - start
    # Runtimes read memory that is not theirs at NaN, and differ in what a negative number of samples is.
    sampled = size.abs() <= torch.finfo(size.dtype).max
    if sampling_ratio == 0:
        sampled = sampled & (size > 0)
    sampled = sampled[:, :1] & sampled[:, 1:]
    if offset is None:
        begin = torch.where(sampled, rois[:, 1:3], _OUTSIDE / spatial_scale)
        end = torch.where(sampled, rois[:, 3:5], (_OUTSIDE + 1) / spatial_scale)
        boxes = torch.cat([rois[:, :1], begin, end], 1)
        pooled = _roi_align(input, boxes, output_size, spatial_scale, sampling_ratio)
    else:
        moves = gamma * offset
        out_h, out_w = output_size
        columns = torch.arange(out_w, device=input.device, dtype=input.dtype)[None, None, :]
        rows = torch.arange(out_h, device=input.device, dtype=input.dtype)[None, :, None]
        x0, x1 = _bin_edges(
            start[:, 0], size[:, 0], sampled, moves[:, 0], columns, out_w, input.shape[3], sampling_ratio
        )
        y0, y1 = _bin_edges(start[:, 1], size[:, 1], sampled, moves[:, 1], rows, out_h, input.shape[2], sampling_ratio)
        images = rois[:, :1, None].expand(-1, out_h, out_w)
        boxes = torch.stack([images, x0, y0, x1, y1], -1).reshape(-1, 5)
        pooled = _roi_align(input, boxes, (1, 1), 1.0, sampling_ratio).reshape(-1, out_h * out_w, input.shape[1])
        pooled = pooled.transpose(1, 2).reshape(-1, input.shape[1], out_h, out_w)
    return (pooled if mask is None else pooled * mask).to(dtype)


def _bin_edges(
    start: Tensor,
    size: Tensor,
    sampled: Tensor,
    moves: Tensor,
    index: Tensor,
    bins: int,
    length: int,
    sampling_ratio: int,
) -> tuple[Tensor, Tensor]:
    """Gives where bins begin and end on one axis, as RoIAlign of scale 1 takes it: tensors (R, out_h, out_w).

    Args:
        start: (R,), where the RoIs begin, in feature-map pixels; `size` is their length.
        sampled: (R, 1), whether the RoI has samples.
        moves: (R, out_h, out_w), how far bins are moved, as a fraction of the RoI's size.
        index: the bins' numbers on this axis, broadcast against `moves`.
        bins: how many there are on this axis.
        length: of the map.
        sampling_ratio: 0 takes ceil(bin size).
    """
    start, size, sampled = start[:, None, None], size[:, None, None], sampled[:, :, None]
    half = size / bins / 2
    middle = start + (index + 0.5) * (size / bins) + moves * size
    if sampling_ratio == 0:
        # RoIAlign computes ceil(end - begin) with rounded edges. For a bin of a whole number of pixels it may then take
        # a sample more. It does not if the size keeps away from whole numbers by more than the rounding.
        slack = 4 * torch.finfo(size.dtype).eps * (middle.abs() + size.abs() + 1)
        grid = torch.ceil(size / bins)
        half = torch.minimum(torch.maximum(size / bins, grid - 1 + slack), grid - slack) / 2
    reach = half.abs() + 1
    sampled = sampled & (middle >= -reach) & (middle <= length + reach)  # also not NaN
    return (
        torch.where(sampled, middle - half + 0.5, _OUTSIDE),
        torch.where(sampled, middle + half + 0.5, _OUTSIDE + 1),
    )


def _roi_align(
    input: Tensor, boxes: Tensor, output_size: Sequence[int], spatial_scale: float, sampling_ratio: int
) -> Tensor:
    from torchvision.ops import roi_align  # the operators need torch only; whoever exports has torchvision too

    return roi_align(input, boxes, list(output_size), spatial_scale, sampling_ratio, aligned=True)


def deform_psroi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float = 1.0,
    group_size: int = 1,
    part_size: Sequence[int] | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    """Computes `dcn_d2.ops.deform_psroi_pool`, which says what the arguments are, with gathers.

    RoIAlign does not know its rule at the border. For one sample of all bins at a time, the four neighbours are
    gathered and blended: all samples together would take sample_per_part**2 times the memory.
    """
    dtype = input.dtype
    input, rois, offset, mask = map(_float_of_half, (input, rois, offset, mask))
    rois = rois.to(input.dtype)
    out_h, out_w = output_size
    part_h, part_w = part_size or output_size
    classes = 1 if offset is None else int(offset.shape[1]) // 2
    rows = torch.arange(out_h, device=input.device)
    columns = torch.arange(out_w, device=input.device)
    if offset is None:
        moves = input.new_zeros(1, 1, 2, 1, 1)
    else:
        moves = offset[:, :, rows * part_h // out_h][:, :, :, columns * part_w // out_w]
        moves = moves.reshape(-1, classes, 2, out_h, out_w) * trans_std
    # A pixel's row in `pixels` holds the channels of one cell and one class.
    pixels, (height, width) = _pixels(input, classes, group_size**2), input.shape[2:]
    cells = (rows * group_size // out_h)[:, None] * group_size + columns * group_size // out_w
    parts = cells * classes + torch.arange(classes, device=input.device)[:, None, None]
    step = group_size**2 * classes
    y, weight_y = _psroi_neighbours(
        rois[:, 2::2], spatial_scale, rows[:, None], out_h, moves[:, :, 1], height, sample_per_part
    )
    x, weight_x = _psroi_neighbours(
        rois[:, 1::2], spatial_scale, columns, out_w, moves[:, :, 0], width, sample_per_part
    )
    images = rois[:, 0].long()[:, None, None, None, None, None]
    y = ((images * height + y) * width) * step + parts[..., None, None]
    x = x * step
    total: Any = 0
    for row in range(sample_per_part):
        for column in range(sample_per_part):
            index = y[..., row, :, None] + x[..., column, None, :]
            weight = weight_y[..., row, :, None] * weight_x[..., column, None, :]
            total = total + torch.matmul(weight.reshape(-1, 1, 4), pixels[index.reshape(-1, 4)])
    channels = pixels.shape[1]
    pooled = total.reshape(-1, classes, out_h * out_w, channels).transpose(2, 3)
    pooled = pooled.reshape(-1, classes * channels, out_h, out_w)
    return (pooled if mask is None else pooled * mask).to(dtype)


def _pixels(input: Tensor, classes: int, cells: int) -> Tensor:
    """Gives (N, C * cells, H, W) `input` as (N * H * W * cells * classes, C / classes) rows."""
    channels = input.shape[1] // (classes * cells)
    batch, _, height, width = input.shape
    parted = input.reshape(batch, classes, channels, cells, height, width)
    return parted.permute(0, 4, 5, 3, 1, 2).reshape(-1, channels)


def _psroi_neighbours(
    corners: Tensor, spatial_scale: float, index: Tensor, bins: int, moves: Tensor, length: int, samples: int
) -> tuple[Tensor, Tensor]:
    """Gives the two neighbours of every sample on one axis, and their weights.

    Args:
        corners: (R, 2), where RoIs begin and end, in image pixels.
        spatial_scale: feature-map pixels per image pixel.
        index: the bins' numbers on this axis, broadcast against (out_h, out_w).
        bins: how many there are on this axis.
        moves: (R, classes, out_h, out_w), how far bins are moved, as a fraction of the RoI's size.
        length: of the map.
        samples: per bin.

    Returns:
        Pixel numbers, and weights that are already divided by the number of samples on the map; both
        (R, classes, out_h, out_w, samples, 2).
    """
    rounded = torch.where(corners < 0, -torch.floor(0.5 - corners), torch.floor(corners + 0.5))
    start = (rounded[:, 0] * spatial_scale - 0.5)[:, None, None, None, None]
    size = ((rounded[:, 1] + 1) * spatial_scale - 0.5)[:, None, None, None, None] - start
    finite = size.abs() <= torch.finfo(size.dtype).max
    size = size.clamp(min=0.1)
    edges = torch.arange(samples, device=corners.device, dtype=corners.dtype) / samples
    position = start + (index[..., None] + edges) * (size / bins) + moves[..., None] * size
    inside = finite & (position >= -0.5) & (position <= length - 0.5)
    position = _at_most(torch.where(inside, position, 0.0).clamp(min=0), length - 1)
    low = torch.floor(position)
    fraction = position - low
    share = inside.to(position.dtype)
    share = share / share.sum(-1, keepdim=True).clamp(min=1)
    neighbours = torch.stack([low, _at_most(low + 1, length - 1)], -1).long()
    return neighbours, torch.stack([(1 - fraction) * share, fraction * share], -1)


def _at_most(values: Tensor, limit: Any) -> Tensor:
    """Limits values by a number, which is a tensor where a tracer records sizes."""
    if isinstance(limit, Tensor):
        return torch.minimum(values, limit.to(values.dtype))
    return values.clamp(max=limit)
