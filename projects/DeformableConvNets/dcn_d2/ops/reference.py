# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Slow, readable operators: the oracle of the tests, and the fallback where no compiled kernel exists.

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
    """Deformable convolution: samples every tap, then multiplies by the weight, conv group by conv group."""
    dtype = input.dtype
    if dtype in (torch.float16, torch.bfloat16):
        input, offset, weight = input.float(), offset.float(), weight.float()
        bias, mask = (None if t is None else t.float() for t in (bias, mask))
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
    """Deformable RoI pooling: averages the grid of samples of every bin of every RoI."""
    dtype = input.dtype
    if dtype in (torch.float16, torch.bfloat16):
        input, rois = input.float(), rois.float()
        offset, mask = (None if t is None else t.float() for t in (offset, mask))
    out_h, out_w = output_size
    pooled = []
    for index, roi in enumerate(rois):
        shift = input.new_zeros(2, out_h, out_w) if offset is None else gamma * offset[index]
        y, x = roi_bin_locations(roi[1:], shift, spatial_scale, sampling_ratio)
        grid_y, grid_x = torch.broadcast_tensors(y[:, :, :, None], x[:, :, None, :])
        samples = bilinear_clamped(input[int(roi[0])], grid_y, grid_x)
        pooled.append(samples.sum((-2, -1)) / max(y.shape[2] * x.shape[2], 1))
    output = torch.stack(pooled) if pooled else input.new_zeros(0, input.shape[1], out_h, out_w) + 0 * input.sum()
    if mask is not None:
        output = output * mask
    return output.to(dtype)


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
    """Deformable position-sensitive RoI pooling: averages those samples of every bin that lie on the map."""
    dtype = input.dtype
    if dtype in (torch.float16, torch.bfloat16):
        input, rois = input.float(), rois.float()
        offset, mask = (None if t is None else t.float() for t in (offset, mask))
    out_h, out_w = output_size
    part_h, part_w = part_size or output_size
    if offset is None:
        offset = input.new_zeros(len(rois), 2, part_h, part_w)
    channels = input.shape[1] // group_size**2
    classes = offset.shape[1] // 2
    rows = torch.arange(out_h, device=input.device)
    columns = torch.arange(out_w, device=input.device)
    # Bin (h, w) reads input channels (channel * group_size + h's group) * group_size + w's group.
    cell = (rows * group_size // out_h)[:, None] * group_size + columns * group_size // out_w
    pooled = []
    for index, roi in enumerate(rois):
        image = input[int(roi[0])]
        parts = offset[index][:, (rows * part_h // out_h)[:, None], columns * part_w // out_w]
        blocks = []
        for block, shift in enumerate(parts.unflatten(0, (classes, 2))):
            y, x = psroi_bin_locations(roi[1:], shift, spatial_scale, sample_per_part, trans_std)
            grid_y, grid_x = torch.broadcast_tensors(y[:, :, :, None], x[:, :, None, :])
            samples, inside = bilinear_half_pixel(image, grid_y, grid_x)
            means = samples.sum((-2, -1)) / inside.sum((-2, -1)).clamp(min=1)
            means = means.unflatten(0, (channels, group_size**2))[
                :, cell, torch.arange(out_h)[:, None], torch.arange(out_w)
            ]
            blocks.append(means.chunk(classes)[block] if classes > 1 else means)
        pooled.append(torch.cat(blocks))
    output = torch.stack(pooled) if pooled else input.new_zeros(0, channels, out_h, out_w) + 0 * input.sum()
    if mask is not None:
        output = output * mask
    return output.to(dtype)


def pull_back(
    function: Callable[..., Any], arguments: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Differentiates `function` at `arguments`, so that the gradients can be differentiated again.

    Args:
        function: gives a tensor or a tuple of tensors.
        arguments: all that it takes.
        needed: which of them want a gradient; for one that is no tensor, or not wanted, there is None.
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

    # torch.autograd.grad would not do: inside another transform of torch.func its operands cannot require gradients.
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
