# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The RoI pooling operators made of RoIAlign, which other runtimes know.

Exported graphs hold these in place of the operators; `dcn_d2.ops.portable` says when. Nothing here depends on values or
on the number of RoIs in Python, so that one graph serves any number, also none. Only the forward pass is of use.

Every bin becomes a RoI of one bin, since bins move on their own. Boxes whose samples must read nothing are put outside
the map. A box of no size would read nothing too, but is NaN in OpenVINO. At NaN coordinates, torchvision and ONNX
Runtime read memory that is not theirs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .portable import load_torchvision
from .reference import _float_of_half

# Where a box outside the map begins; it is one pixel long. RoIAlign reads nothing more than a pixel outside the map.
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
    """Computes `dcn_d2.ops.deform_roi_pool`, which says what the arguments are.

    Without offsets it is RoIAlign. With sampling_ratio 0, RoIAlign chooses the number of samples of each bin. That is
    not bounded by the size of the map, as in the operator: a RoI of a million pixels takes forever. Detectors clip
    their boxes to the image.
    """
    dtype = input.dtype
    input, rois, offset, mask = map(_float_of_half, (input, rois, offset, mask))
    rois = rois.to(input.dtype)
    start = rois[:, 1:3] * spatial_scale - 0.5
    size = (rois[:, 3:5] * spatial_scale - 0.5) - start
    sampled = _is_finite(size)
    if sampling_ratio == 0:
        sampled = sampled & (size > 0)
    sampled = sampled[:, :1] & sampled[:, 1:]
    if offset is None:
        begin = torch.where(sampled, rois[:, 1:3], _OUTSIDE / spatial_scale)
        end = torch.where(sampled, rois[:, 3:5], (_OUTSIDE + 1) / spatial_scale)
        boxes = torch.cat([rois[:, :1], begin, end], 1)
        pooled = _roi_align(input, boxes, output_size, spatial_scale, sampling_ratio)
    else:
        out_h, out_w = output_size

        def edges(axis: int, index: Tensor, bins: int, length: int) -> tuple[Tensor, Tensor]:
            first, extent = start[:, axis, None, None], size[:, axis, None, None]
            bin_size = extent / bins
            middle = first + (index + 0.5) * bin_size + gamma * offset[:, axis] * extent
            reach = bin_size.abs() + 1
            used = sampled[:, :, None] & (middle >= -reach) & (middle <= length + reach)  # not if it is NaN
            half = (_away_from_integers(bin_size, middle) if sampling_ratio == 0 else bin_size) / 2
            return _box(middle - half, middle + half, used)

        y0, y1 = edges(1, _numbers(out_h, input)[None, :, None], out_h, input.shape[2])
        x0, x1 = edges(0, _numbers(out_w, input)[None, None, :], out_w, input.shape[3])
        images = rois[:, :1, None].expand(-1, out_h, out_w)
        boxes = torch.stack([images, x0, y0, x1, y1], -1).reshape(-1, 5)
        pooled = _as_map(_roi_align(input, boxes, (1, 1), 1.0, sampling_ratio).flatten(1), 1, output_size)
    return (pooled if mask is None else pooled * mask).to(dtype)


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
    """Computes `dcn_d2.ops.deform_psroi_pool`, which says what the arguments are.

    A bin whose samples all lie on the map is a bin of RoIAlign. At the border the two have different rules, so the
    samples of RoIs that have bins which it cuts are read one by one.
    """
    dtype = input.dtype
    input, rois, offset, mask = map(_float_of_half, (input, rois, offset, mask))
    rois = rois.to(input.dtype)
    out_h, out_w = output_size
    part_h, part_w = part_size or output_size
    classes = 1 if offset is None else _static(offset.shape[1]) // 2
    rows = torch.arange(out_h, device=input.device)[:, None].expand(out_h, out_w)
    columns = torch.arange(out_w, device=input.device).expand(out_h, out_w)
    moves = input.new_zeros(1, 1, 2, 1, 1)
    if offset is not None:
        # -1 comes first: for it, torch's older exporter to ONNX divides by the other sizes, and R may be zero.
        of_parts = offset.reshape(-1, classes, 2, part_h * part_w)
        moves = of_parts[:, :, :, rows * part_h // out_h * part_w + columns * part_w // out_w] * trans_std
    y = _psroi_axis(rois[:, 2::2], spatial_scale, rows, out_h, moves[:, :, 1], input.shape[2], sample_per_part)
    x = _psroi_axis(rois[:, 1::2], spatial_scale, columns, out_w, moves[:, :, 0], input.shape[3], sample_per_part)

    # Channels that are read together become an image of their own.
    parts = classes * group_size**2
    images = rois[:, 0, None, None, None].expand(-1, classes, out_h, out_w)
    if parts > 1:
        cells = rows * group_size // out_h * group_size + columns * group_size // out_w
        images = images * parts + cells * classes + _numbers(classes, input)[:, None, None]
        channels, size = _static(input.shape[1]) // parts, input.shape[2:]
        input = input.reshape(-1, classes, channels, group_size**2, *size).permute(0, 3, 1, 2, 4, 5)
        input = input.reshape(-1, channels, *size)
    images = images.reshape(-1, classes * out_h * out_w, 1)

    whole = y.whole & x.whole
    boxes = torch.cat([images, *_interleaved(_box(x.begin, x.end, whole), _box(y.begin, y.end, whole))], 2)
    bins = _roi_align(input, boxes.reshape(-1, 5), (1, 1), 1.0, sample_per_part)
    bins = bins.reshape(-1, classes * out_h * out_w, _static(input.shape[1]))
    # Not the numbers of the bins: torch's newer exporter to ONNX would limit how many there are to more than 64 bits.
    (cut,) = ((~whole & (y.kept * x.kept > 0)).to(bins.dtype).sum((1, 2)) > 0).nonzero(as_tuple=True)
    bins.index_put_((cut,), _mean_of_samples(input, images[cut], y.take(cut), x.take(cut)))
    pooled = _as_map(bins, classes, output_size)
    return (pooled if mask is None else pooled * mask).to(dtype)


class _Axis(NamedTuple):
    """Where the B bins of each of R RoIs sample on one axis."""

    begin: Tensor  # (R, B, 1), half a sample before the first
    end: Tensor  # (R, B, 1), half a sample after the last
    positions: Tensor  # (R, B, samples)
    inside: Tensor  # (R, B, samples), which samples lie on the map, as numbers
    kept: Tensor  # (R, B, 1), how many do
    whole: Tensor  # (R, B, 1), whether all do

    def take(self, rois: Tensor) -> _Axis:
        """The same for the RoIs of these numbers."""
        return _Axis(*(value[rois] for value in self))


def _psroi_axis(
    corners: Tensor, spatial_scale: float, index: Tensor, bins: int, moves: Tensor, length: int, samples: int
) -> _Axis:
    """Gives where all bins sample on one axis, in feature-map pixels.

    Args:
        corners: (R, 2), where RoIs begin and end, in image pixels.
        spatial_scale: feature-map pixels per image pixel.
        index: (out_h, out_w), the bins' numbers on this axis.
        bins: how many there are on this axis.
        moves: (R, classes, out_h, out_w) or a number, how far bins are moved, as a fraction of the RoI's size.
        length: of the map.
        samples: per bin.
    """
    rounded = torch.where(corners < 0, -torch.floor(0.5 - corners), torch.floor(corners + 0.5))[:, :, None, None, None]
    start = rounded[:, 0] * spatial_scale - 0.5
    size = (rounded[:, 1] + 1) * spatial_scale - 0.5 - start
    finite = _is_finite(size)
    size = size.clamp(min=0.1)
    first = index * (size / bins) + start + moves * size  # in the order of the kernels: a sum decides what is inside
    shape = -1, moves.shape[1] * index.shape[0] * index.shape[1], 1
    spacing = (size / bins / samples).expand(first.shape).reshape(shape)
    finite, first = finite.expand(first.shape).reshape(shape), first.reshape(shape)
    positions = first + _numbers(samples, first) * spacing
    inside = (positions >= -0.5) & (positions <= length - 0.5) & finite
    on_map = inside.to(first.dtype)
    last = samples - 1
    return _Axis(
        first - spacing / 2,
        positions.narrow(2, last, 1) + spacing / 2,
        positions,
        on_map,
        on_map.sum(2, keepdim=True),
        inside.narrow(2, 0, 1) & inside.narrow(2, last, 1),
    )


def _mean_of_samples(input: Tensor, images: Tensor, y: _Axis, x: _Axis) -> Tensor:
    """Averages the samples of (R, B, 1) bins that lie on the map: (R, B, C)."""
    bins, samples, channels = (_static(size) for size in (*y.positions.shape[1:], input.shape[1]))
    half = (x.end - x.begin) / (2 * samples)
    rows = _box(y.begin, y.end, y.kept > 0)
    weight = y.inside / (y.kept * x.kept).clamp(min=1)
    total: Any = 0
    for column in range(samples):  # one of them at a time: all together take so many times the memory
        position, inside = (value.narrow(2, column, 1) for value in (x.positions, x.inside))
        columns = _box(position - half, position + half, inside > 0)
        boxes = torch.cat([images, *_interleaved(columns, rows)], 2).reshape(-1, 5)
        values = _roi_align(input, boxes, (samples, 1), 1.0, 1).reshape(-1, bins, channels, samples)
        total = total + torch.matmul(values, (weight * inside).unsqueeze(3))
    return total.squeeze(3)


def _interleaved(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Gives two (begin, end) as x0, y0, x1, y1."""
    return x[0], y[0], x[1], y[1]


def _box(begin: Tensor, end: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Gives where boxes begin and end as RoIAlign of scale 1 takes it; those that are not used go outside the map."""
    return torch.where(used, begin + 0.5, _OUTSIDE), torch.where(used, end + 0.5, _OUTSIDE + 1)


def _away_from_integers(bin_size: Tensor, middle: Tensor) -> Tensor:
    """Moves sizes of bins away from whole numbers by more than rounding changes them.

    RoIAlign takes ceil(end - begin) samples, of edges that were rounded. For a bin of four pixels it might take five.
    """
    slack = 4 * torch.finfo(bin_size.dtype).eps * (middle.abs() + bin_size + 1)
    grid = torch.ceil(bin_size)
    return torch.minimum(torch.maximum(bin_size, grid - 1 + slack), grid - slack)


def _as_map(bins: Tensor, classes: int, output_size: Sequence[int]) -> Tensor:
    """Gives the C channels of every bin of every class, RoI by RoI, as (R, classes * C, out_h, out_w)."""
    channels = _static(bins.shape[-1])
    bins = bins.reshape(-1, classes, output_size[0] * output_size[1], channels).transpose(2, 3)
    return bins.reshape(-1, classes * channels, *output_size)


def _is_finite(values: Tensor) -> Tensor:
    return values.abs() <= torch.finfo(values.dtype).max


def _numbers(count: int, like: Tensor) -> Tensor:
    """Gives 0, 1, ... in the dtype and on the device of `like`."""
    return torch.arange(count, dtype=like.dtype, device=like.device)


def _static(size: int) -> int:
    """Gives a size that is part of the model as a number, also where `torch.jit.trace` records sizes as tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return int(size)


def _roi_align(
    input: Tensor, boxes: Tensor, output_size: Sequence[int], spatial_scale: float, sampling_ratio: int
) -> Tensor:
    """Runs `torchvision::roi_align`, aligned. The operators need torch only, but other runtimes know this name."""
    load_torchvision()
    out_h, out_w = output_size
    return torch.ops.torchvision.roi_align(input, boxes, spatial_scale, out_h, out_w, sampling_ratio, True)
