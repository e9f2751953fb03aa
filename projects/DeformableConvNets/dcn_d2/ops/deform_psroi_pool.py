# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable position-sensitive RoI pooling, the original of DCNv1 and v2: schema, autograd, shapes, autocast."""

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
    "deform_psroi_pool",
    [
        ("int[2]", "output_size"),
        ("float", "spatial_scale=1.0"),
        ("int", "group_size=1"),
        ("int[2]?", "part_size=None"),
        ("int", "sample_per_part=4"),
        ("float", "trans_std=0.1"),
    ],
)


def deform_psroi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: IntPair,
    spatial_scale: float = 1.0,
    group_size: int = 1,
    part_size: IntPair | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    """Pools every RoI into a grid of bins as the authors of DCNv1 and v2 did, each bin moved by its offset.

    A layer of `deform_roi_pool` and one of this have the same parameters, but compute something else. RoI corners are
    rounded to whole pixels and include the last one. Every bin is divided into sample_per_part x sample_per_part equal
    shares, with a sample on the upper left corner of each. Samples off the map do not count. MMDetection's published
    dpool and mdpool models were trained and scored with it. A sample contributes for -0.5 <= position <= size - 0.5.
    Outside the map it is clamped to it, and its derivative is zero. A bin without samples, NaN offsets, and RoIs that
    are not finite give zero. Half precision accumulates in float32. `rois` get no gradient.

    Results are contiguous, but the gradient by a channels_last input of several channels is channels_last.

    On CUDA, the gradient by the input is summed by atomics. Under `torch.use_deterministic_algorithms` it is summed in
    fixed point, so that every run gives the same bits. It is all NaN then if any value of the output's gradient or of
    the mask is not finite.

    Gradients of gradients, and all that is differentiated in forward mode, are computed by the reference in Python:
    right, but slow.

    Sources: Dai et al., "Deformable Convolutional Networks", ICCV 2017, section 2.2 and the authors' code; numerics of
    `deform_psroi_pooling` in MMDetection up to 2.2.

    Args:
        input: (N, C * group_size**2, H, W), float64, float32, float16 or bfloat16. Bin (h, w) of output channel c reads
            input channel (c * group_size + gh) * group_size + gw, where (gh, gw) is its cell of a grid of
            group_size x group_size; 1 is pooling that is not position-sensitive.
        rois: (R, 5) of (batch index, x0, y0, x1, y1) in image pixels; input's dtype, or float32.
        offset: (R, 2 * classes, part_h, part_w), in (x, y) order, as a fraction of the RoI's size before trans_std;
            each class moves C / classes channels, and usually there is one. None is plain pooling.
        output_size: bins, a number or (out_h, out_w).
        spatial_scale: feature-map pixels per image pixel.
        part_size: size of the offsets' grid, a number or a pair; None takes output_size.
        sample_per_part: samples per bin and axis.
        trans_std: scales the offsets.
        mask: (R, 1, out_h, out_w), the modulation after the sigmoid, or None.

    Returns:
        (R, C, out_h, out_w).

    Raises:
        RuntimeError: A tensor's rank, shape, dtype, device or layout does not fit, or (on CPU) a batch index is not
            a whole number or outside the batch; the message names it and both values. On CUDA such a RoI gives NaN.
        TypeError: An operand is not a tensor.
        ValueError: output_size or part_size is not an integer, of any kind, or a pair of them; group_size or
            sample_per_part is not an integer; or spatial_scale or trans_std is not a number.

    Example:
        >>> import torch
        >>> from dcn_d2.ops import deform_psroi_pool
        >>> image = torch.arange(4.0).reshape(1, 4, 1, 1).expand(1, 4, 8, 8)  # the value of a pixel is its channel
        >>> rois = torch.tensor([[0.0, 1.0, 1.0, 6.0, 6.0]])
        >>> deform_psroi_pool(image, rois, None, 2, group_size=2)  # each bin reads a channel of its own
        tensor([[[[0., 1.],
                  [2., 3.]]]])
    """
    if not are_tensors((input, rois), (offset, mask)):
        check_types("deform_psroi_pool", ("offset", "mask"), input=input, rois=rois, offset=offset, mask=mask)
    pool = portable_pooling.deform_psroi_pool if are_portable() else torch.ops.dcn_d2.deform_psroi_pool
    return pool(
        input,
        rois_for(input, rois),
        offset,
        pair(output_size, "output_size"),
        number(spatial_scale, "spatial_scale"),
        integer(group_size, "group_size"),
        None if part_size is None else pair(part_size, "part_size"),
        integer(sample_per_part, "sample_per_part"),
        number(trans_std, "trans_std"),
        mask,
    )


def _check_operands(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float,
    group_size: int,
    part_size: Sequence[int] | None,
    sample_per_part: int,
    trans_std: float,
    mask: Tensor | None,
) -> tuple[int, ...]:
    """Checks what `csrc/deform_psroi_pool.h` checks, for the reference and for tracing. Returns the output's shape."""
    name = "deform_psroi_pool"
    check_input_dtype(name, input)
    check_tensor(name, "input", input, input, 4)
    check_rois(name, rois, input)
    part = part_size or output_size
    check_least(name, "output_size", output_size, 1)
    check_least(name, "part_size", part, 1)
    for argument, value in (("group_size", group_size), ("sample_per_part", sample_per_part)):
        check(value >= 1, lambda: f"{name}: {argument} must be at least 1, got {value}")
    channels = input.shape[1] // group_size**2
    check(
        input.shape[1] % group_size**2 == 0,
        lambda: f"{name}: input has {input.shape[1]} channels, but needs a multiple of group_size^2 = {group_size**2}",
    )
    if offset is not None:
        check_tensor(name, "offset", offset, input, 4)
        classes = offset.shape[1] // 2
        check(
            classes > 0 and offset.shape[1] % 2 == 0 and channels % classes == 0,
            lambda: (
                f"{name}: offset has {offset.shape[1]} channels, but needs 2 * classes, where classes divides the "
                f"{channels} output channels"
            ),
        )
        check_shape(name, "offset", offset, (rois.shape[0], offset.shape[1], *part))
    if mask is not None:
        check_tensor(name, "mask", mask, input, 4)
        check_shape(name, "mask", mask, (rois.shape[0], 1, *output_size))
    return rois.shape[0], channels, *output_size


register_roi_pool("deform_psroi_pool", _check_operands, check_rois, reference.deform_psroi_pool)
