# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable RoI pooling, plain, deformable and modulated: schema, autograd, shapes, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._arguments import IntPair, check, check_input_dtype, check_shape, check_tensor, pair
from ._library import define, needed_gradients, refuse_nondeterministic, register_autocast, register_fallback

define(
    "deform_roi_pool(Tensor input, Tensor rois, Tensor? offset, int[2] output_size, float spatial_scale=1.0, "
    "int sampling_ratio=0, float gamma=0.1, Tensor? mask=None) -> Tensor"
)
define(
    "deform_roi_pool_backward(Tensor grad, Tensor input, Tensor rois, Tensor? offset, Tensor? mask, "
    "int[2] output_size, float spatial_scale, int sampling_ratio, float gamma, bool need_input, bool need_offset) "
    "-> (Tensor, Tensor, Tensor)"
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

    With `offset=None` it is RoIAlign with `aligned=True`. The grid of samples follows from the undeformed RoI; bin
    (h, w) is then moved by gamma * roi_width * offset[:, 0, h, w] in x and gamma * roi_height * offset[:, 1, h, w]
    in y: the order of the two is opposite to deformable convolution's. A sample contributes for -1 <= position <=
    size and is clamped to the map, where its derivative is zero; NaN offsets, and RoIs that are not finite or of no
    area, give zero. Half precision accumulates in float32. `rois` get no gradient.

    Sources: Dai et al., "Deformable Convolutional Networks", ICCV 2017, section 2.2; Zhu et al., "Deformable ConvNets
    v2", CVPR 2019; numerics of `mmcv.ops.deform_roi_pool`, whose offset gradient differs in the clamped border strip.

    Args:
        input: (N, C, H, W), float64, float32, float16 or bfloat16.
        rois: (R, 5) of (batch index, x0, y0, x1, y1) in image pixels; input's dtype, or float32 with half precision.
        offset: (R, 2, out_h, out_w), in (x, y) order, as a fraction of the RoI's size before gamma; or None.
        output_size: bins, a number or (out_h, out_w).
        spatial_scale: feature-map pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 takes ceil(bin size in feature-map pixels).
        gamma: scales the offsets.
        mask: (R, 1, out_h, out_w), the modulation after the sigmoid, or None.

    Returns:
        (R, C, out_h, out_w).

    Raises:
        RuntimeError: A tensor's rank, shape, dtype or device does not fit, or (on CPU) a batch index is outside the
            batch; the message names it and both values. On CUDA such a RoI gives NaN.
        ValueError: output_size is not a number or a pair.
    """
    return torch.ops.dcn_d2.deform_roi_pool(
        input, rois, offset, pair(output_size, "output_size"), spatial_scale, sampling_ratio, gamma, mask
    )


def _check_operands(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Sequence[int],
    sampling_ratio: int,
    mask: Tensor | None,
) -> None:
    """Checks what `csrc/deform_roi_pool.h` checks, for the reference and for tracing."""
    name = "deform_roi_pool"
    check_input_dtype(name, input)
    check_tensor(name, "input", input, input, 4)
    half = input.dtype in (torch.float16, torch.bfloat16)
    check_tensor(name, "rois", rois, input.float() if half and rois.dtype == torch.float32 else input, 2)
    check(rois.shape[1] == 5, lambda: f"{name}: rois must have shape [R, 5], got {list(rois.shape)}")
    check(min(output_size) > 0, lambda: f"{name}: output_size must be at least 1, got {list(output_size)}")
    check(sampling_ratio >= 0, lambda: f"{name}: sampling_ratio must be at least 0, got {sampling_ratio}")
    for operand, tensor, channels in (("offset", offset, 2), ("mask", mask, 1)):
        if tensor is not None:
            check_tensor(name, operand, tensor, input, 4)
            check_shape(name, operand, tensor, (rois.shape[0], channels, *output_size))


def _reference_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    _check_operands(input, rois, offset, output_size, sampling_ratio, mask)
    for index in rois[:, 0].tolist():
        check(
            0 <= index < input.shape[0],
            lambda: f"deform_roi_pool: rois name image {index}, but input has {input.shape[0]} images",
        )
    return reference.deform_roi_pool(input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, mask)


def _reference_backward(
    grad: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    need_input: bool,
    need_offset: bool,
) -> tuple[Tensor, ...]:
    def forward(input: Tensor, *rest: Tensor) -> Tensor:
        given = iter(rest)
        moved, scaled = (None if t is None else next(given) for t in (offset, mask))
        return reference.deform_roi_pool(input, rois, moved, output_size, spatial_scale, sampling_ratio, gamma, scaled)

    operands = [t for t in (input, offset, mask) if t is not None]
    found = iter(reference.gradients(forward, operands, grad, (need_input, need_offset, need_offset)))
    return tuple(grad.new_empty(0) if t is None else next(found) for t in (input, offset, mask))


register_fallback("deform_roi_pool", _reference_forward)
register_fallback("deform_roi_pool_backward", _reference_backward)


@torch.library.register_fake("dcn_d2::deform_roi_pool")
def _fake(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    _check_operands(input, rois, offset, output_size, sampling_ratio, mask)
    return input.new_empty(rois.shape[0], input.shape[1], *output_size)


@torch.library.register_fake("dcn_d2::deform_roi_pool_backward")
def _fake_backward(
    grad: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    need_input: bool,
    need_offset: bool,
) -> tuple[Tensor, ...]:
    needed = ((input, need_input), (offset, need_offset), (mask, need_offset))
    return tuple(grad.new_empty(0 if t is None or not need else t.shape) for t, need in needed)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, rois, offset, *ctx.geometry, mask = inputs
    ctx.save_for_backward(input, rois, offset, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, rois, offset, mask = ctx.saved_tensors
    need_input, _, need_offset, *_, need_mask = needed_gradients(ctx, 8)
    refuse_nondeterministic("deform_roi_pool_backward", grad.device)
    gradients: Sequence[Tensor] = torch.ops.dcn_d2.deform_roi_pool_backward(
        grad, input, rois, offset, mask, *ctx.geometry, need_input, need_offset or need_mask
    )
    grad_input, grad_offset, grad_mask = (
        gradient if needed else None for gradient, needed in zip(gradients, (need_input, need_offset, need_mask))
    )
    return grad_input, None, grad_offset, None, None, None, None, grad_mask


torch.library.register_autograd("dcn_d2::deform_roi_pool", _backward, setup_context=_setup_context)
register_autocast("deform_roi_pool", keep_float32=("rois",))
