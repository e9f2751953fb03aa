# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""How many multiply-adds the operators cost, and the formulas for torch's counter.

What counts is the product with the weight, as in a plain convolution of the same shape, and the interpolation: four
multiply-adds for each sample and channel. Masks, biases and the positions themselves are left out. Only shapes are
known here: where the grid of a RoI pooling follows from the RoIs (`sampling_ratio=0`), a bin counts as 2 x 2 samples.
`torch.utils.flop_counter` counts a multiply-add as two operations, fvcore (`dcn_d2.modeling`) as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]

# Multiply-adds to read a sample: one for each of its four neighbours.
NEIGHBOURS = 4
# Samples along a bin's side where the operator chooses.
ADAPTIVE_GRID = 2


def convolution(input: Shape, offset: Shape, weight: Shape) -> tuple[int, int]:
    """Multiply-adds of the product with the weight, and of sampling all taps, from shapes.

    `offset` may also be the shape of an offset branch's output.
    """
    positions = offset[0] * prod(offset[2:])
    return positions * prod(weight), positions * input[1] * prod(weight[2:]) * NEIGHBOURS


def pooling(output: Shape, samples_per_side: int) -> int:
    """Multiply-adds of pooling to `output`, (R, C, out_h, out_w)."""
    return prod(output) * (samples_per_side or ADAPTIVE_GRID) ** 2 * NEIGHBOURS


def _convolution_flops(input: Shape, offset: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * sum(convolution(input, offset, weight))


def _convolution_backward_flops(_: Shape, input: Shape, offset: Shape, weight: Shape, *rest: Any, **__: Any) -> int:
    need_input, need_offset, need_weight = rest[-3:]
    product, sampling = convolution(input, offset, weight)
    # The gradients of the samples are a product. The input's are scattered, the offset's need derivatives in y and x,
    # and the weight's reads the samples again.
    products = int(need_input or need_offset) + need_weight
    return 2 * (products * product + (need_input + 2 * need_offset + need_weight) * sampling)


def _pooling_flops(argument: str, default: int, index: int) -> tuple[Callable[..., int], Callable[..., int]]:
    """The formulas of a pooling and its backward; argument number `index` says how many samples a bin has."""

    def forward(*args: Any, out_shape: Shape, **kwargs: Any) -> int:
        samples = args[index] if len(args) > index else kwargs.get(argument, default)
        return 2 * pooling(out_shape, samples)

    def backward(grad: Shape, *args: Any, **_: Any) -> int:
        # The backward operator has the mask before the geometry, so the argument's place is one further on.
        need_input, need_offset = args[-3:-1]
        return 2 * (need_input + 2 * need_offset) * pooling(grad, args[index + 1])

    return forward, backward


def register_formulas() -> None:
    """Makes `torch.utils.flop_counter.FlopCounterMode` count the operators and their backward operators."""
    operators = torch.ops.dcn_d2
    for name in ("deform_conv2d", "modulated_deform_conv2d"):
        register_flop_formula(getattr(operators, name))(_convolution_flops)
        register_flop_formula(getattr(operators, f"{name}_backward"))(_convolution_backward_flops)
    for name, argument, default, index in (
        ("deform_roi_pool", "sampling_ratio", 0, 5),
        ("deform_psroi_pool", "sample_per_part", 4, 7),
    ):
        for formula, suffix in zip(_pooling_flops(argument, default, index), ("", "_backward")):
            register_flop_formula(getattr(operators, name + suffix))(formula)
