# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Where samples fall, and what a sample reads: the one Python source of both.

The reference operators and the drawing code call these functions, so a picture cannot contradict the maths. In the
compiled kernels, positions are computed in ``csrc/deform_conv2d.h``, ``csrc/deform_roi_pool.h`` and
``csrc/deform_psroi_pool.h``, and ``csrc/sample.h`` says what a sample reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._arguments import IntPair, pair


def deform_conv2d_locations(
    offset: Tensor, kernel_size: IntPair, stride: IntPair = 1, padding: IntPair = 0, dilation: IntPair = 1
) -> Tensor:
    """Gives the position that every tap of every output location of a deformable convolution reads.

    Tap (i, j) of output (h, w) reads y = h * stride - padding + i * dilation + offset_y. For x it is the same with w
    and j.
    Source: Dai et al., "Deformable Convolutional Networks", ICCV 2017, eq. 2; the order of the offset channels is
    that of the authors' code, MMDetection and ``torchvision.ops.deform_conv2d``.

    Args:
        offset: (N, 2 * deform_groups * kernel_h * kernel_w, out_h, out_w) in input pixels; (y, x) pairs interleaved
            per tap, deform group by deform group.
        kernel_size: a number or (height, width).
        stride: a number or (height, width).
        padding: a number or (height, width).
        dilation: a number or (height, width).

    Returns:
        (N, deform_groups, kernel_h * kernel_w, out_h, out_w, 2) tensor of (y, x) in input pixels, differentiable
        in ``offset``.
    """
    (kernel_h, kernel_w), (stride_h, stride_w) = pair(kernel_size, "kernel_size"), pair(stride, "stride")
    (pad_h, pad_w), (dilation_h, dilation_w) = pair(padding, "padding"), pair(dilation, "dilation")
    taps = kernel_h * kernel_w
    batch, channels, out_h, out_w = offset.shape
    if channels % (2 * taps):
        raise ValueError(
            f"offset has {channels} channels, but needs a multiple of 2 * {kernel_h} * {kernel_w} = {2 * taps}"
        )
    shift = offset.reshape(batch, channels // (2 * taps), taps, 2, out_h, out_w).movedim(3, -1)

    def grid(size: int, step: int, pad: int) -> Tensor:
        return torch.arange(size, device=offset.device, dtype=offset.dtype) * step - pad

    tap_y = torch.arange(kernel_h, device=offset.device, dtype=offset.dtype) * dilation_h
    tap_x = torch.arange(kernel_w, device=offset.device, dtype=offset.dtype) * dilation_w
    y = grid(out_h, stride_h, pad_h)[None, :, None] + tap_y.repeat_interleave(kernel_w)[:, None, None]
    x = grid(out_w, stride_w, pad_w)[None, None, :] + tap_x.repeat(kernel_h)[:, None, None]
    return torch.stack(torch.broadcast_tensors(y, x), -1) + shift


def roi_bin_locations(roi: Tensor, shift: Tensor, spatial_scale: float, sampling_ratio: int) -> tuple[Tensor, Tensor]:
    """Gives the sample rows and columns of the bins of one RoI of deformable RoI pooling.

    The samples of a bin form a grid with centres at (k + 0.5) * bin_size / grid_size, as in RoIAlign with
    ``aligned=True``. The whole grid of a bin is moved by its shift. A RoI that is not finite has no samples.

    Args:
        roi: (4,) tensor (x0, y0, x1, y1) in image pixels.
        shift: (2, out_h, out_w), the bins' shifts in (x, y), as a fraction of the RoI's size.
        spatial_scale: feature-map pixels per image pixel.
        sampling_ratio: samples a side of the grid; 0 takes ceil(bin_size), so none where the RoI is empty.

    Returns:
        y of shape (out_h, out_w, grid_h) and x of shape (out_h, out_w, grid_w), in feature-map pixels, differentiable
        in ``shift``. A bin's samples are all pairs of its y and x.
    """
    out_h, out_w = shift.shape[1:]
    x0, y0, x1, y1 = (roi * spatial_scale - 0.5).unbind()
    height, width = y1 - y0, x1 - x0
    finite = bool(torch.isfinite(height) & torch.isfinite(width))
    if not finite:  # it has no samples, but NaN would still reach the gradients by `shift`
        x0, y0, height, width = (torch.zeros_like(x0) for _ in range(4))

    def positions(start: Tensor, size: Tensor, bins: int, index: Tensor, move: Tensor) -> Tensor:
        bin_size = size / bins
        grid = 0 if not finite else sampling_ratio if sampling_ratio > 0 else max(int(torch.ceil(bin_size)), 0)
        centres = (torch.arange(grid, device=roi.device, dtype=roi.dtype) + 0.5) / max(grid, 1)
        return start + (index + centres) * bin_size + (move * size)[..., None]

    rows = torch.arange(out_h, device=roi.device, dtype=roi.dtype)[:, None, None]
    columns = torch.arange(out_w, device=roi.device, dtype=roi.dtype)[None, :, None]
    return positions(y0, height, out_h, rows, shift[1]), positions(x0, width, out_w, columns, shift[0])


def psroi_bin_locations(
    roi: Tensor, offset: Tensor, spatial_scale: float, sample_per_part: int, trans_std: float
) -> tuple[Tensor, Tensor]:
    """Gives the sample rows and columns of the bins of one RoI of deformable position-sensitive RoI pooling.

    The RoI's corners are rounded to whole image pixels, half away from zero, and include the last one. A RoI is at
    least 0.1 feature-map pixels long. One that is not finite has no samples on the map. A bin is divided into
    sample_per_part equal shares along each axis, and each sample lies on the upper left corner of its share.

    Args:
        roi: (4,) tensor (x0, y0, x1, y1) in image pixels.
        offset: (2, out_h, out_w), the bins' offsets in (x, y), as a fraction of the RoI's size before trans_std.
        spatial_scale: feature-map pixels per image pixel.
        sample_per_part: samples per bin and axis.
        trans_std: scales the offsets.

    Returns:
        y and x, both of shape (out_h, out_w, sample_per_part), in feature-map pixels, differentiable in `offset`.
    """
    out_h, out_w = offset.shape[1:]
    rounded = torch.where(roi < 0, -torch.floor(0.5 - roi), torch.floor(roi + 0.5))
    x0, y0 = (rounded[:2] * spatial_scale - 0.5).unbind()
    x1, y1 = ((rounded[2:] + 1) * spatial_scale - 0.5).unbind()

    def positions(start: Tensor, end: Tensor, bins: int, index: Tensor, move: Tensor) -> Tensor:
        size = end - start
        if not bool(torch.isfinite(size)):  # NaN lies off the map; the size must not reach the gradients by `offset`
            start, size = torch.full_like(start, torch.nan), torch.zeros_like(size)
        size = size.clamp(min=0.1)
        edges = torch.arange(sample_per_part, device=roi.device, dtype=roi.dtype) / sample_per_part
        return start + (index + edges) * (size / bins) + (move * trans_std * size)[..., None]

    rows = torch.arange(out_h, device=roi.device, dtype=roi.dtype)[:, None, None]
    columns = torch.arange(out_w, device=roi.device, dtype=roi.dtype)[None, :, None]
    return positions(y0, y1, out_h, rows, offset[1]), positions(x0, x1, out_w, columns, offset[0])


def bilinear_zeros(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Reads (C, H, W) ``image`` at positions of any shape, bilinearly, with zeros outside the map.

    A position contributes only for -1 < y < H and -1 < x < W; NaN and infinite positions read zero and get zero
    gradients. Returns (C, y.shape...). This is the sampling rule of deformable convolution.
    """
    height, width = image.shape[1:]
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    return _bilinear(image, torch.where(inside, y, -1), torch.where(inside, x, -1), inside)


def bilinear_clamped(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Reads (C, H, W) ``image`` at positions of any shape, bilinearly, with RoIAlign's rule at the border.

    A position contributes only for -1 <= y <= H and -1 <= x <= W, and is then clamped to the map, where its
    derivative is zero. NaN and infinite positions read zero. Returns (C, y.shape...).
    """
    height, width = image.shape[1:]
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y = torch.where(inside, y, 0).clamp(0, max(height - 1, 0))
    x = torch.where(inside, x, 0).clamp(0, max(width - 1, 0))
    return _bilinear(image, y, x, inside)


def bilinear_half_pixel(image: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Reads (C, H, W) `image` at positions of any shape with the border rule of position-sensitive RoI pooling.

    A position contributes only for -0.5 <= y <= H - 0.5 and -0.5 <= x <= W - 0.5, and is then clamped to the map. Its
    neighbours are floor and ceil, so the derivative is zero where they coincide. Returns the values (C, y.shape...) and
    which positions contribute.
    """
    height, width = image.shape[1:]
    inside = (y >= -0.5) & (y <= height - 0.5) & (x >= -0.5) & (x <= width - 0.5)

    def clamp(position: Tensor, size: int) -> Tensor:
        position = torch.where(inside, position, 0)
        fixed = position.detach().clamp(0, max(size - 1, 0))
        return torch.where((fixed == position) & (fixed != fixed.floor()), position, fixed)

    return _bilinear(image, clamp(y, height), clamp(x, width), inside), inside


def _bilinear(image: Tensor, y: Tensor, x: Tensor, inside: Tensor) -> Tensor:
    """Sums the four neighbours of finite positions; neighbours outside the map count as zero."""
    height, width = image.shape[1:]
    top, left = y.detach().floor(), x.detach().floor()
    fraction_y, fraction_x = y - top, x - left
    flat = image.flatten(1)
    total = image.new_zeros(image.shape[0], *y.shape)
    for row, weight_y in ((top, 1 - fraction_y), (top + 1, fraction_y)):
        for column, weight_x in ((left, 1 - fraction_x), (left + 1, fraction_x)):
            exists = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = torch.where(exists, row * width + column, 0).long()
            value = flat[:, index.flatten()].unflatten(1, y.shape) if flat.shape[1] else total
            total = total + torch.where(exists, value * (weight_y * weight_x), 0)
    return total
