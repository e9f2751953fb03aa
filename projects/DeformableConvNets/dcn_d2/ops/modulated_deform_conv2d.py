# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Modulated deformable convolution that takes the output of an offset branch as it is, without splitting it first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import portable, reference
from ._arguments import IntPair, are_tensors, check_types, in_strides_of, new_empty_in_format_of, pair
from ._autograd import register_derivatives, register_second_derivatives
from ._library import define, register_autocast, register_fake, register_without_kernel
from .deform_conv2d import check_operands

define(
    "modulated_deform_conv2d(Tensor input, Tensor offset_and_mask, Tensor weight, Tensor? bias=None, "
    "int[2] stride=1, int[2] padding=0, int[2] dilation=1) -> Tensor"
)
define(
    "modulated_deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset_and_mask, Tensor weight, "
    "int[2] stride, int[2] padding, int[2] dilation, bool need_input, bool need_offset, bool need_weight) "
    "-> (Tensor, Tensor, Tensor)"
)


def modulated_deform_conv2d(
    input: Tensor,
    offset_and_mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = (1, 1),
    padding: IntPair = (0, 0),
    dilation: IntPair = (1, 1),
) -> Tensor:
    """Modulated deformable convolution (v2) by the output of an offset branch.

    It gives the same as `deform_conv2d` with the offsets and the modulation of `split_offset_and_mask`. It is faster:
    the sigmoid is taken inside, and neither the branch's output nor its gradient is split, joined or copied as a whole.

    Source: Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", CVPR 2019, section 3.2.

    Args:
        input: (N, in_channels, in_h, in_w), float64, float32, float16 or bfloat16.
        offset_and_mask: (N, 3 * deform_groups * kernel_h * kernel_w, out_h, out_w), contiguous or channels_last. The
            first two thirds are offsets in input pixels, (y, x) interleaved per tap, deform group by deform group. The
            last third is the logits of the modulation.
        weight: (out_channels, in_channels / groups, kernel_h, kernel_w).
        bias: (out_channels,) or None.
        stride: a number or (height, width).
        padding: of zeros, a number or (height, width).
        dilation: a number or (height, width).

    Returns:
        (N, out_channels, out_h, out_w), in the memory format of `input`.

    Raises:
        RuntimeError: A tensor's rank, shape, dtype, device or layout does not fit; the message names it and both
            values.
        TypeError: An operand is not a tensor.
        ValueError: stride, padding or dilation is not an integer, of any kind, or a pair of them.

    Example:
        >>> import torch
        >>> from dcn_d2.ops import modulated_deform_conv2d
        >>> image, weight = torch.ones(1, 4, 5, 6), torch.ones(2, 4, 1, 1)
        >>> offset_and_mask = torch.zeros(1, 3, 5, 6)  # one tap: y, x, and the logit of its mask
        >>> out = modulated_deform_conv2d(image, offset_and_mask, weight)
        >>> out.shape, out.unique()  # 4 channels of ones, each times sigmoid(0)
        (torch.Size([1, 2, 5, 6]), tensor([2.]))
    """
    if not are_tensors((input, offset_and_mask, weight), (bias,)):
        check_types(
            "modulated_deform_conv2d", ("bias",), input=input, offset_and_mask=offset_and_mask, weight=weight, bias=bias
        )
    geometry = pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation")
    if portable.are_portable():
        if portable.can_check():
            _check(input, offset_and_mask, weight, bias, *geometry)
        offset, mask = split_offset_and_mask(offset_and_mask)
        return portable.deform_conv2d(input, offset, weight, bias, *geometry, mask)
    return torch.ops.dcn_d2.modulated_deform_conv2d(input, offset_and_mask, weight, bias, *geometry)


def split_offset_and_mask(offset_and_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Splits an offset branch's output for a modulated layer into offsets and modulation.

    Args:
        offset_and_mask: (N, 3 * deform_groups * kernel_h * kernel_w, H, W). The first two thirds are offsets, (y, x)
            interleaved per tap, deform group by deform group. The last third is the logits of the modulation. (Code
            that cuts the channels into three may suggest "all y, all x, mask", but that is not the order.)

    Returns:
        The offsets, a view, and the modulation after the sigmoid, so 0.5 everywhere where the branch gives zeros.

    Example:
        >>> import torch
        >>> from dcn_d2.ops import split_offset_and_mask
        >>> offset, mask = split_offset_and_mask(torch.zeros(1, 27, 5, 6))  # of a 3 x 3 kernel
        >>> offset.shape, mask.shape
        (torch.Size([1, 18, 5, 6]), torch.Size([1, 9, 5, 6]))
        >>> mask.unique()
        tensor([0.5000])
    """
    logits = offset_and_mask.shape[1] // 3
    offset, mask = offset_and_mask.split([2 * logits, logits], dim=1)
    return offset, mask.sigmoid()


def _check(
    input: Tensor, offset_and_mask: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Sequence[int]
) -> tuple[int, int]:
    stride, padding, dilation = geometry
    return check_operands(input, offset_and_mask, weight, bias, stride, padding, dilation, None, joint=True)


def _in_parts(
    convolve: Callable[..., Tensor], input: Tensor, offset_and_mask: Tensor, weight: Tensor, *rest: Any
) -> Tensor:
    """Splits the branch's output, and calls `convolve` with the offsets and the mask."""
    _check(input, offset_and_mask, weight, *rest)
    offset, mask = split_offset_and_mask(offset_and_mask)
    return convolve(input, offset, weight, *rest, mask)


def _forward_in_parts(*arguments: Any) -> Tensor:
    """For devices without a kernel of this operator: splits, and calls `deform_conv2d`."""
    return _in_parts(torch.ops.dcn_d2.deform_conv2d, *arguments)


def _backward_in_parts(
    grad: Tensor, input: Tensor, offset_and_mask: Tensor, weight: Tensor, *geometry_and_needed: Any
) -> tuple[Tensor, ...]:
    need_offset = geometry_and_needed[-2]
    offset, mask = split_offset_and_mask(offset_and_mask)
    grad_input, grad_offset, grad_weight, grad_mask = torch.ops.dcn_d2.deform_conv2d_backward(
        grad, input, offset, weight, mask, *geometry_and_needed
    )
    if need_offset:
        joined = torch.cat([grad_offset, grad_mask * mask * (1 - mask)], dim=1)
        grad_offset = in_strides_of(new_empty_in_format_of(offset_and_mask, joined.shape), joined)
    return grad_input, grad_offset, grad_weight


def _fake(*arguments: Any) -> Tensor:
    out_h, out_w = _check(*arguments)
    input, _, weight = arguments[:3]
    return new_empty_in_format_of(input, (input.shape[0], weight.shape[0], out_h, out_w))


def _fake_backward(
    grad: Tensor, input: Tensor, offset_and_mask: Tensor, weight: Tensor, *geometry_and_needed: Any
) -> tuple[Tensor, ...]:
    operands, needed = (input, offset_and_mask, weight), geometry_and_needed[-3:]
    return tuple(
        new_empty_in_format_of(operand, operand.shape) if wanted else grad.new_empty(0)
        for operand, wanted in zip(operands, needed)
    )


def _differentiable_forward(*arguments: Any) -> Tensor:
    return _in_parts(reference.deform_conv2d, *arguments)


def _differentiable_backward(
    grad: Tensor, input: Tensor, offset_and_mask: Tensor, weight: Tensor, *geometry_and_needed: Any
) -> tuple[Tensor, ...]:
    *geometry, need_input, need_offset, need_weight = geometry_and_needed

    def forward(input: Tensor, offset_and_mask: Tensor, weight: Tensor) -> Tensor:
        return _differentiable_forward(input, offset_and_mask, weight, None, *geometry)

    needed = (need_input, need_offset, need_weight)
    return reference.gradients(forward, (input, offset_and_mask, weight), grad, needed)


def _backward(arguments: Sequence[Any], needed: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
    input, offset_and_mask, weight, _, *geometry = arguments
    *of_operands, need_bias = needed[:4]
    gradients: Sequence[Tensor] = torch.ops.dcn_d2.modulated_deform_conv2d_backward(
        grad, input, offset_and_mask, weight, *geometry, *of_operands
    )
    found = [gradient if wanted else None for gradient, wanted in zip(gradients, of_operands)]
    return *found, grad.sum((0, 2, 3)) if need_bias else None, None, None, None


# `register_fallback` would warn. Here `deform_conv2d` is called, which has kernels or warns by itself.
register_without_kernel("modulated_deform_conv2d", _forward_in_parts)
register_without_kernel("modulated_deform_conv2d_backward", _backward_in_parts)
register_fake("modulated_deform_conv2d", _fake)
register_fake("modulated_deform_conv2d_backward", _fake_backward)
register_derivatives("modulated_deform_conv2d", _backward, _differentiable_forward)
register_second_derivatives("modulated_deform_conv2d_backward", _differentiable_backward)
register_autocast("modulated_deform_conv2d", float32_on_cpu=("offset_and_mask",))
