# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Slow, readable operators: what the tests compare with, and the fallback where no compiled kernel exists.

They are plain differentiable torch, so autograd gives the reference gradients. Half precision is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .sampling import (
    bilinear_clamped,
    bilinear_half_pixel,
    bilinear_zeros,
    deform_conv2d_locations,
    psroi_bin_locations,
    roi_bin_locations,
)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None,
) -> Tensor:
    """Deformable convolution: samples every tap, then multiplies by the weight, conv group by conv group.

    Args:
        input: (N, in_channels, in_h, in_w).
        offset: (N, 2 * deform_groups * kernel_h * kernel_w, out_h, out_w), (y, x) pairs in input pixels.
        weight: (out_channels, in_channels / groups, kernel_h, kernel_w).
        bias: (out_channels,) or None.
        stride: (height, width); so are padding and dilation.
        mask: (N, deform_groups * kernel_h * kernel_w, out_h, out_w) or None.

    Returns:
        (N, out_channels, out_h, out_w).
    """
    dtype = input.dtype
    input, offset, weight, bias, mask = map(_float_of_half, (input, offset, weight, bias, mask))
    out_channels, _, kernel_h, kernel_w = weight.shape
    taps, groups = kernel_h * kernel_w, input.shape[1] // max(weight.shape[1], 1)
    batch, _, out_h, out_w = offset.shape
    deform_groups = offset.shape[1] // (2 * taps)

    y, x = deform_conv2d_locations(offset, (kernel_h, kernel_w), stride, padding, dilation).unbind(-1)
    columns = input.new_zeros(batch, input.shape[1], taps, out_h, out_w)
    if columns.numel():
        images = input.unflatten(1, (deform_groups, -1))
        columns = torch.stack(
            [
                torch.cat([bilinear_zeros(images[n, g], y[n, g], x[n, g]) for g in range(deform_groups)])
                for n in range(batch)
            ]
        )
    if mask is not None:
        per_group = columns.unflatten(1, (deform_groups, -1)) * mask.reshape(
            batch, deform_groups, 1, taps, out_h, out_w
        )
        columns = per_group.flatten(1, 2)
    output = torch.einsum(
        "ngkhw,gok->ngohw",
        columns.reshape(batch, groups, weight.shape[1] * taps, out_h, out_w),
        weight.reshape(groups, out_channels // groups, weight.shape[1] * taps),
    ).reshape(batch, out_channels, out_h, out_w)
    if bias is not None:
        output = output + bias[:, None, None]
    return output.to(dtype)


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
    """Deformable RoI pooling: averages the grid of samples of every bin of every RoI.

    Args:
        input: (N, C, H, W).
        rois: (R, 5) of (batch index, x0, y0, x1, y1) in image pixels.
        offset: (R, 2, out_h, out_w) in (x, y) order, as a fraction of the RoI's size before gamma; or None.
        output_size: (out_h, out_w).
        spatial_scale: feature-map pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 takes ceil(bin size in feature-map pixels).
        gamma: scales the offsets.
        mask: (R, 1, out_h, out_w) or None.

    Returns:
        (R, C, out_h, out_w).
    """
    offsets = _float_of_half(offset)

    def pool(index: int, image: Tensor, box: Tensor) -> Tensor:
        shift = image.new_zeros(2, *output_size) if offsets is None else gamma * offsets[index]
        y, x = roi_bin_locations(box, shift, spatial_scale, sampling_ratio)
        samples = bilinear_clamped(image, *_grid(y, x))
        return samples.sum((-2, -1)) / max(y.shape[2] * x.shape[2], 1)

    return _pool_each(input, rois, mask, (input.shape[1], *output_size), pool)


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
    """Deformable position-sensitive RoI pooling: averages those samples of every bin that lie on the map.

    Args:
        input: (N, C * group_size**2, H, W).
        rois: (R, 5) of (batch index, x0, y0, x1, y1) in image pixels.
        offset: (R, 2 * classes, part_h, part_w) in (x, y) order, as a fraction of the RoI's size before trans_std; or
            None.
        output_size: (out_h, out_w).
        spatial_scale: feature-map pixels per image pixel.
        group_size: input channels of an output channel lie in a grid of so many cells a side.
        part_size: (part_h, part_w); None takes output_size.
        sample_per_part: samples per bin and axis.
        trans_std: scales the offsets.
        mask: (R, 1, out_h, out_w) or None.

    Returns:
        (R, C, out_h, out_w).
    """
    out_h, out_w = output_size
    part_h, part_w = part_size or output_size
    offsets = _float_of_half(offset)
    channels, classes = input.shape[1] // group_size**2, 1 if offsets is None else offsets.shape[1] // 2
    rows = torch.arange(out_h, device=input.device)
    columns = torch.arange(out_w, device=input.device)
    # Bin (h, w) reads input channels (channel * group_size + h's group) * group_size + w's group.
    cell = (rows * group_size // out_h)[:, None] * group_size + columns * group_size // out_w

    def pool(index: int, image: Tensor, box: Tensor) -> Tensor:
        all_offsets = image.new_zeros(2, part_h, part_w) if offsets is None else offsets[index]
        of_bins = all_offsets[:, (rows * part_h // out_h)[:, None], columns * part_w // out_w]
        of_classes = []
        for number, shift in enumerate(of_bins.unflatten(0, (classes, 2))):
            y, x = psroi_bin_locations(box, shift, spatial_scale, sample_per_part, trans_std)
            samples, inside = bilinear_half_pixel(image, *_grid(y, x))
            means = samples.sum((-2, -1)) / inside.sum((-2, -1)).clamp(min=1)
            means = means.unflatten(0, (channels, group_size**2))[:, cell, rows[:, None], columns]
            of_classes.append(means.chunk(classes)[number] if classes > 1 else means)
        return torch.cat(of_classes)

    return _pool_each(input, rois, mask, (channels, out_h, out_w), pool)


def _float_of_half(tensor: Any) -> Any:
    """Gives a tensor of half precision as float32, and everything else as it is."""
    half = isinstance(tensor, Tensor) and tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if half else tensor


def _grid(y: Tensor, x: Tensor) -> list[Tensor]:
    """Gives all pairs of (out_h, out_w, n) rows and (out_h, out_w, m) columns: two tensors (out_h, out_w, n, m)."""
    return list(torch.broadcast_tensors(y[:, :, :, None], x[:, :, None, :]))


def _pool_each(
    input: Tensor,
    rois: Tensor,
    mask: Tensor | None,
    shape: Sequence[int],
    pool: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """Pools every RoI, and scales its bins by the mask.

    Args:
        input: (N, C, H, W).
        rois: (R, 5) of (batch index, x0, y0, x1, y1).
        mask: (R, 1, out_h, out_w) or None.
        shape: what `pool` gives for one RoI, (channels, out_h, out_w).
        pool: called with the number of a RoI, its (C, H, W) image and its (4,) box.
    """
    dtype = input.dtype
    input, rois, mask = map(_float_of_half, (input, rois, mask))
    pooled = [pool(index, input[int(roi[0])], roi[1:]) for index, roi in enumerate(rois)]
    # Without RoIs too, the output depends on the input: its gradient is zero, not missing.
    output = torch.stack(pooled) if pooled else input.new_zeros(0, *shape) + 0 * input.sum()
    return (output if mask is None else output * mask).to(dtype)


def pull_back(
    function: Callable[..., Any], arguments: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Differentiates `function` at `arguments`; the gradients can be differentiated again.

    Args:
        function: gives a tensor or a tuple of tensors.
        arguments: all that it takes.
        needed: which of them want a gradient. What is not wanted, or not a tensor, gets None.
        grads: one for each tensor that `function` gives.
    """
    wanted = [index for index, need in enumerate(needed) if need and isinstance(arguments[index], Tensor)]
    gradients: list[Tensor | None] = [None] * len(arguments)
    if not wanted:
        return gradients

    def of_wanted(*tensors: Tensor) -> Any:
        values = list(arguments)
        for index, tensor in zip(wanted, tensors):
            values[index] = tensor
        return function(*values)

    # torch.autograd.grad does not work here: inside a transform of torch.func its operands cannot require gradients.
    output, pull = torch.func.vjp(  # type: ignore[misc]
        of_wanted, *(arguments[index] for index in wanted)
    )
    for index, gradient in zip(wanted, pull(grads[0] if isinstance(output, Tensor) else tuple(grads))):
        gradients[index] = gradient
    return gradients


def gradients(
    forward: Callable[..., Tensor], operands: Sequence[Tensor | None], grad: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Differentiates `forward` at `operands`; one that is None or not needed gives an empty tensor."""
    found = pull_back(forward, operands, needed, (grad,))
    return tuple(grad.new_empty(0) if gradient is None else gradient for gradient in found)
