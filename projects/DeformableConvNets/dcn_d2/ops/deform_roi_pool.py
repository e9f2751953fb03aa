# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable RoI pooling, plain, deformable and modulated: schema, autograd, shapes, autocast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import portable_pooling, reference
from ._arguments import (
    IntPair,
    are_tensors,
    check,
    check_input_dtype,
    check_least,
    check_rois,
    check_shape,
    check_tensor,
    check_types,
    integer,
    number,
    pair,
)
from ._roi_pool import define_roi_pool, register_roi_pool, rois_for
from .portable import are_portable

define_roi_pool(
    "deform_roi_pool",
    [
        ("int[2]", "output_size"),
        ("float", "spatial_scale=1.0"),
        ("int", "sampling_ratio=0"),
        ("float", "gamma=0.1"),
    ],
)


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: IntPair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    """Pools every RoI into a grid of bins, each bin moved by its offset and scaled by its mask.

    With `offset=None` it is RoIAlign with `aligned=True`. The grid of samples follows from the undeformed RoI. Bin
    (h, w) is then moved by gamma * roi_width * offset[:, 0, h, w] in x and gamma * roi_height * offset[:, 1, h, w]
    in y: x comes first, unlike in deformable convolution. A sample contributes for -1 <= position <= size. Outside the
    map it is clamped to it, and its derivative is zero. NaN offsets and RoIs that are not finite give zero. A RoI of no
    area gives zero too where sampling_ratio is 0; a fixed sampling_ratio samples it at the line or point that it is, as
    mmcv does. Half precision accumulates in float32. `rois` get no gradient.

    Results are contiguous, but the gradient by a channels_last input of several channels is channels_last.

    On CUDA, the gradient by the input is summed by atomics. Under `torch.use_deterministic_algorithms` it is summed in
    fixed point, so that every run gives the same bits. It is all NaN then if any value of the output's gradient or of
    the mask is not finite.

    Gradients of gradients, and all that is differentiated in forward mode, are computed by the reference in Python:
    right, but slow.

    Sources: Dai et al., "Deformable Convolutional Networks", ICCV 2017, section 2.2; Zhu et al., "Deformable ConvNets
    v2", CVPR 2019; numerics of `mmcv.ops.deform_roi_pool`, whose offset gradient differs in the clamped border strip.

    Args:
        input: (N, C, H, W), float64, float32, float16 or bfloat16.
        rois: (R, 5) of (batch index, x0, y0, x1, y1) in image pixels; input's dtype, or float32.
        offset: (R, 2, out_h, out_w), in (x, y) order, as a fraction of the RoI's size before gamma; or None.
        output_size: bins, a number or (out_h, out_w).
        spatial_scale: feature-map pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 takes ceil(bin size in feature-map pixels).
        gamma: scales the offsets.
        mask: (R, 1, out_h, out_w), the modulation after the sigmoid, or None.

    Returns:
        (R, C, out_h, out_w).

    Raises:
        RuntimeError: A tensor's rank, shape, dtype, device or layout does not fit, or (on CPU) a batch index is not
            a whole number or outside the batch; the message names it and both values. On CUDA such a RoI gives NaN.
        TypeError: An operand is not a tensor.
        ValueError: output_size is not an integer, of any kind, or a pair of them; sampling_ratio is not an integer; or
            spatial_scale or gamma is not a number.

    Example:
        >>> import torch
        >>> from dcn_d2.ops import deform_roi_pool
        >>> image = torch.arange(8.0).expand(1, 1, 8, 8)  # the value of a pixel is its x
        >>> rois = torch.tensor([[0.0, 2.0, 2.0, 6.0, 6.0]])  # of image 0, 4 x 4 pixels
        >>> deform_roi_pool(image, rois, None, (1, 2))  # two bins, with centres at x = 2.5 and 4.5
        tensor([[[[2.5000, 4.5000]]]])
        >>> offset = torch.zeros(1, 2, 1, 2)
        >>> offset[:, 0] = 2.5  # moves both bins by gamma * 2.5 = a quarter of the RoI's width, one pixel
        >>> deform_roi_pool(image, rois, offset, (1, 2))
        tensor([[[[3.5000, 5.5000]]]])
    """
    if not are_tensors((input, rois), (offset, mask)):
        check_types("deform_roi_pool", ("offset", "mask"), input=input, rois=rois, offset=offset, mask=mask)
    pool = portable_pooling.deform_roi_pool if are_portable() else torch.ops.dcn_d2.deform_roi_pool
    return pool(
        input,
        rois_for(input, rois),
        offset,
        pair(output_size, "output_size"),
        number(spatial_scale, "spatial_scale"),
        integer(sampling_ratio, "sampling_ratio"),
        number(gamma, "gamma"),
        mask,
    )


def _check_operands(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    mask: Tensor | None,
) -> tuple[int, ...]:
    """Checks what `csrc/deform_roi_pool.h` checks, for the reference and for tracing. Returns the output's shape."""
    name = "deform_roi_pool"
    check_input_dtype(name, input)
    check_tensor(name, "input", input, input, 4)
    check_rois(name, rois, input)
    check_least(name, "output_size", output_size, 1)
    check(sampling_ratio >= 0, lambda: f"{name}: sampling_ratio must be at least 0, got {sampling_ratio}")
    for operand, tensor, channels in (("offset", offset, 2), ("mask", mask, 1)):
        if tensor is not None:
            check_tensor(name, operand, tensor, input, 4)
            check_shape(name, operand, tensor, (rois.shape[0], channels, *output_size))
    return rois.shape[0], input.shape[1], *output_size


register_roi_pool("deform_roi_pool", _check_operands, check_rois, reference.deform_roi_pool)
