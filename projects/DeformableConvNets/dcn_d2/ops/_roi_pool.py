# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What both RoI pooling operators register in the same way; only their geometry arguments differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._arguments import in_strides_of, new_empty_in_format_of
from ._autograd import register_derivatives, register_second_derivatives
from ._library import define, register_autocast, register_fake, register_fallback


def rois_for(input: Tensor, rois: Tensor) -> Tensor:
    """Gives RoIs of a dtype that the operators take: float32 ones, as Detectron2's boxes are, fit any feature map."""
    return rois.double() if input.dtype == torch.float64 and rois.dtype == torch.float32 else rois


def define_roi_pool(name: str, geometry: Sequence[tuple[str, str]]) -> None:
    """Defines `name` and its backward operator; `geometry` has (type, name=default) of the arguments after `offset`."""
    types = ", ".join(f"{kind} {argument}" for kind, argument in geometry)
    required = ", ".join(f"{kind} {argument.partition('=')[0]}" for kind, argument in geometry)
    define(f"{name}(Tensor input, Tensor rois, Tensor? offset, {types}, Tensor? mask=None) -> Tensor")
    define(
        f"{name}_backward(Tensor grad, Tensor input, Tensor rois, Tensor? offset, Tensor? mask, {required}, "
        "bool need_input, bool need_offset, bool deterministic) -> (Tensor, Tensor, Tensor)"
    )


def register_roi_pool(
    name: str,
    check_operands: Callable[..., Sequence[int]],
    check_batch: Callable[..., None],
    oracle: Callable[..., Tensor],
) -> None:
    """Registers fake kernels, autograd, autocast and the fallback.

    Args:
        name: the operator's; its arguments are input, rois, offset, the geometry, mask.
        check_operands: raises an error for bad operands; returns the output's shape.
        check_batch: raises an error for RoIs of images that do not exist; called as (name, rois, input, True).
        oracle: the reference of the same arguments.
    """
    backward_operator = getattr(torch.ops.dcn_d2, f"{name}_backward")

    def differentiable_forward(*values: Any) -> Tensor:
        check_operands(*values)
        check_batch(name, values[1], values[0], True)
        input, rois, *rest = values
        return oracle(input, rois.detach(), *rest)

    def reference_forward(*values: Any) -> Tensor:
        promised = fake(*values)
        check_batch(name, values[1], values[0], True)
        return in_strides_of(promised, oracle(*values))

    def differentiable_backward(
        grad: Tensor, input: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        *geometry, need_input, need_offset, _ = rest

        def forward(input: Tensor, offset: Tensor | None, mask: Tensor | None) -> Tensor:
            return oracle(input, rois.detach(), offset, *geometry, mask)  # no order of derivative is by the RoIs

        return reference.gradients(forward, (input, offset, mask), grad, (need_input, need_offset, need_offset))

    def reference_backward(*values: Any) -> tuple[Tensor, ...]:
        promised, found = fake_backward(*values), differentiable_backward(*values)
        return tuple(in_strides_of(*each) for each in zip(promised, found))

    def fake(*values: Any) -> Tensor:
        return values[0].new_empty(check_operands(*values))

    def fake_backward(
        grad: Tensor, input: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        *_, need_input, need_offset, _ = rest
        grad_input = new_empty_in_format_of(input, input.shape) if need_input else grad.new_empty(0)
        return grad_input, *(
            grad.new_empty(0) if t is None or not need_offset else t.new_empty(t.shape) for t in (offset, mask)
        )

    def backward(values: Sequence[Any], needed: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        input, rois, offset, *geometry, mask = values
        need_input, _, need_offset, *_, need_mask = needed
        deterministic = torch.are_deterministic_algorithms_enabled()
        gradients = backward_operator(
            grad, input, rois, offset, mask, *geometry, need_input, need_offset or need_mask, deterministic
        )
        grad_input, grad_offset, grad_mask = (
            gradient if wanted else None for gradient, wanted in zip(gradients, (need_input, need_offset, need_mask))
        )
        return grad_input, None, grad_offset, *(None for _ in geometry), grad_mask

    register_fallback(name, reference_forward)
    register_fallback(f"{name}_backward", reference_backward)
    register_fake(name, fake)
    register_fake(f"{name}_backward", fake_backward)
    register_derivatives(name, backward, differentiable_forward)
    register_second_derivatives(f"{name}_backward", differentiable_backward)
    register_autocast(name, keep_float32=("rois",))
