# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable convolution, v1 and v2 (modulated): schema, autograd, shapes, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import portable, reference
from ._arguments import (
    IntPair,
    are_tensors,
    check,
    check_input_dtype,
    check_least,
    check_positions,
    check_shape,
    check_tensor,
    check_types,
    in_strides_of,
    new_empty_in_format_of,
    pair,
)
from ._autograd import register_derivatives, register_second_derivatives
from ._library import define, register_autocast, register_fake, register_fallback

define(
    "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias=None, int[2] stride=1, "
    "int[2] padding=0, int[2] dilation=1, Tensor? mask=None) -> Tensor"
)
define(
    "deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset, Tensor weight, Tensor? mask, int[2] stride, "
    "int[2] padding, int[2] dilation, bool need_input, bool need_offset, bool need_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = (1, 1),
    padding: IntPair = (0, 0),
    dilation: IntPair = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Convolves `input` at sampling positions moved by `offset`, each sample scaled by `mask` if one is given.

    A drop-in for `torchvision.ops.deform_conv2d`. It differs in one point: a sample at exactly -1 lies outside and gets
    no offset gradient, as in the authors' and MMDetection's kernels. The numbers of conv groups and deform groups
    follow from the shapes. A sample is bilinear with zeros outside the map and contributes only for
    -1 < position < size in both axes. NaN and infinite offsets read zero and get zero gradients. Half precision
    accumulates in float32.

    A channels_last input of several channels gives a channels_last output, any other input a contiguous one. The
    gradients by input and weight have the memory format of these, and those by offset and mask are contiguous.

    On CPU, offsets and mask may be float32 beside operands of half precision, and stay so under autocast. Gradients
    jump where a sample passes a pixel's border: with offsets of some pixels, rounded to bfloat16, they were 10 % off,
    and 0.4 % without rounding. On CUDA, offsets and mask have the dtype of the input, also under autocast.

    On CUDA, float32 operands are rounded to TF32 where torch allows that for convolutions, which is its default:
    `torch.backends.cudnn.conv.fp32_precision`. Results and gradients have the same bits from run to run. Conv groups of
    few channels are multiplied together, so that an infinite or NaN input also shows in the outputs of other groups.

    Gradients of gradients, and all that is differentiated in forward mode (`torch.func.jvp`, `jacfwd`, dual numbers),
    are computed by the reference in Python: right, but slow. `torch.vmap` calls the operator for each sample.

    Sources: Dai et al., "Deformable Convolutional Networks", ICCV 2017; Zhu et al., "Deformable ConvNets v2: More
    Deformable, Better Results", CVPR 2019; numerics of `torchvision.ops.deform_conv2d`.

    Args:
        input: (N, in_channels, in_h, in_w), float64, float32, float16 or bfloat16.
        offset: (N, 2 * deform_groups * kernel_h * kernel_w, out_h, out_w) in input pixels; (y, x) pairs interleaved
            per tap, deform group by deform group. Each deform group moves in_channels / deform_groups channels.
        weight: (out_channels, in_channels / groups, kernel_h, kernel_w).
        bias: (out_channels,) or None.
        stride: a number or (height, width).
        padding: of zeros, a number or (height, width).
        dilation: a number or (height, width).
        mask: (N, deform_groups * kernel_h * kernel_w, out_h, out_w), the modulation after the sigmoid, or None (v1).

    Returns:
        (N, out_channels, out_h, out_w) with out = (in + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1.

    Raises:
        RuntimeError: A tensor's rank, shape, dtype, device or layout does not fit; the message names it and both
            values.
        TypeError: An operand is not a tensor.
        ValueError: stride, padding or dilation is not an integer, of any kind, or a pair of them.

    Example:
        >>> import torch
        >>> from dcn_d2.ops import deform_conv2d
        >>> image = torch.arange(9.0).reshape(1, 1, 3, 3)
        >>> weight = torch.ones(1, 1, 1, 1)  # one tap: the output is what is sampled
        >>> offset = torch.zeros(1, 2, 3, 3)
        >>> offset[:, 1] = 0.5  # half a pixel to the right; beyond the last column is zero
        >>> deform_conv2d(image, offset, weight)
        tensor([[[[0.5000, 1.5000, 1.0000],
                  [3.5000, 4.5000, 2.5000],
                  [6.5000, 7.5000, 4.0000]]]])
    """
    if not are_tensors((input, offset, weight), (bias, mask)):
        check_types("deform_conv2d", ("bias", "mask"), input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    geometry = pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation")
    if portable.are_portable():
        if portable.can_check():
            check_operands(input, offset, weight, bias, *geometry, mask)
        return portable.deform_conv2d(input, offset, weight, bias, *geometry, mask)
    return torch.ops.dcn_d2.deform_conv2d(input, offset, weight, bias, *geometry, mask)


def check_operands(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None,
    joint: bool = False,
) -> tuple[int, int]:
    """Checks what `csrc/deform_conv2d.h` checks, for the reference and for tracing. Returns (out_h, out_w).

    With `joint`, the operator is modulated_deform_conv2d, and `offset` its offset_and_mask.
    """
    name, offset_name, per_tap = (
        ("modulated_deform_conv2d", "offset_and_mask", 3) if joint else ("deform_conv2d", "offset", 2)
    )
    check_input_dtype(name, input)
    for operand, tensor in (("input", input), ("weight", weight)):
        check_tensor(name, operand, tensor, input, 4)
    check_positions(name, offset_name, offset, input)
    batch, in_channels, in_h, in_w = input.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    taps = kernel_h * kernel_w
    for argument, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        check_least(name, argument, values, least)
    check(taps > 0, lambda: f"{name}: weight has an empty kernel, {kernel_h} x {kernel_w}")
    check(
        group_channels > 0 and in_channels % group_channels == 0,
        lambda: f"{name}: input has {in_channels} channels, but needs a multiple of weight's {group_channels}",
    )
    groups = in_channels // group_channels
    check(
        out_channels % max(groups, 1) == 0,
        lambda: f"{name}: weight has {out_channels} output channels, but needs a multiple of the {groups} groups",
    )
    channels = offset.shape[1]
    deform_groups, kernel = channels // (per_tap * taps), f"{kernel_h} * {kernel_w}"
    check(
        deform_groups > 0 and channels % (per_tap * taps) == 0,
        lambda: (
            f"{name}: {offset_name} has {channels} channels, but needs a multiple of {per_tap} * {kernel} = "
            f"{per_tap * taps}"
        ),
    )
    check(
        in_channels % deform_groups == 0,
        lambda: (
            f"{name}: input has {in_channels} channels, but needs a multiple of {offset_name}'s {deform_groups} groups"
        ),
    )
    out_h, out_w = (
        (size + 2 * pad - step * (kernel - 1) - 1) // jump + 1
        for size, pad, step, kernel, jump in zip((in_h, in_w), padding, dilation, (kernel_h, kernel_w), stride)
    )
    check(
        out_h > 0 and out_w > 0,
        lambda: (
            f"{name}: input of {in_h} x {in_w} is too small for weight's kernel: the output would be {out_h} x {out_w}"
        ),
    )
    check_shape(name, offset_name, offset, (batch, channels, out_h, out_w))
    if mask is not None:
        check_positions(name, "mask", mask, input)
        check_shape(name, "mask", mask, (batch, deform_groups * taps, out_h, out_w))
    if bias is not None:
        check_tensor(name, "bias", bias, input, 1)
        check_shape(name, "bias", bias, (out_channels,))
    return out_h, out_w


def _reference_forward(*arguments: Any) -> Tensor:
    return in_strides_of(_fake(*arguments), reference.deform_conv2d(*arguments))


def _differentiable_forward(*arguments: Any) -> Tensor:
    check_operands(*arguments)
    return reference.deform_conv2d(*arguments)


def _differentiable_backward(
    grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *geometry_and_needed: Any
) -> tuple[Tensor, ...]:
    stride, padding, dilation, need_input, need_offset, need_weight = geometry_and_needed

    def forward(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
        return reference.deform_conv2d(input, offset, weight, None, stride, padding, dilation, mask)

    needed = (need_input, need_offset, need_weight, need_offset)
    return reference.gradients(forward, (input, offset, weight, mask), grad, needed)


def _reference_backward(*arguments: Any) -> tuple[Tensor, ...]:
    promised, found = _fake_backward(*arguments), _differentiable_backward(*arguments)
    return tuple(in_strides_of(*each) for each in zip(promised, found))


def _fake(*arguments: Any) -> Tensor:
    out_h, out_w = check_operands(*arguments)
    input, _, weight = arguments[:3]
    return new_empty_in_format_of(input, (input.shape[0], weight.shape[0], out_h, out_w))


def _fake_backward(
    grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *geometry_and_needed: Any
) -> tuple[Tensor, ...]:
    """Gradients by input and weight have the memory format of these; those by offset and mask are contiguous."""
    need_input, need_offset, need_weight = geometry_and_needed[-3:]

    def empty(like: Tensor | None, needed: bool) -> Tensor:
        return grad.new_empty(0) if like is None or not needed else like.new_empty(like.shape)

    grad_input = new_empty_in_format_of(input, input.shape) if need_input else grad.new_empty(0)
    grad_weight = new_empty_in_format_of(weight, weight.shape) if need_weight else grad.new_empty(0)
    return grad_input, empty(offset, need_offset), grad_weight, empty(mask, need_offset)


def _backward(arguments: Sequence[Any], needed: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight, _, stride, padding, dilation, mask = arguments
    need_input, need_offset, need_weight, need_bias, *_, need_mask = needed
    gradients: Sequence[Tensor | None] = torch.ops.dcn_d2.deform_conv2d_backward(
        grad, input, offset, weight, mask, stride, padding, dilation, need_input, need_offset or need_mask, need_weight
    )
    grad_input, grad_offset, grad_weight, grad_mask = (
        gradient if wanted else None
        for gradient, wanted in zip(gradients, (need_input, need_offset, need_weight, need_mask))
    )
    grad_bias = grad.sum((0, 2, 3)) if need_bias else None
    return grad_input, grad_offset, grad_weight, grad_bias, None, None, None, grad_mask


register_fallback("deform_conv2d", _reference_forward)
register_fallback("deform_conv2d_backward", _reference_backward)
register_fake("deform_conv2d", _fake)
register_fake("deform_conv2d_backward", _fake_backward)
register_derivatives("deform_conv2d", _backward, _differentiable_forward)
register_second_derivatives("deform_conv2d_backward", _differentiable_backward)
register_autocast("deform_conv2d", float32_on_cpu=("offset", "mask"))
