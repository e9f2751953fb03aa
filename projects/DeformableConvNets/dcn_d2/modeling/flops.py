# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Lets `FlopCountAnalysis` of fvcore and Detectron2 count the operators. It would leave them out otherwise.

`dcn_d2.ops.flops` says what is counted.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from fvcore.nn.jit_handles import get_shape

from ..ops import flops

Handle = Callable[[Sequence[Any], Sequence[Any]], int]


def _convolution(inputs: Sequence[Any], _: Sequence[Any]) -> int:
    return sum(flops.convolution(*map(get_shape, inputs[:3])))


def _pooling(index: int) -> Handle:
    def handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        return flops.pooling(get_shape(outputs[0]), inputs[index].toIValue())

    return handle


HANDLES: dict[str, Handle] = {
    "dcn_d2::deform_conv2d": _convolution,
    "dcn_d2::modulated_deform_conv2d": _convolution,
    "dcn_d2::deform_roi_pool": _pooling(5),
    "dcn_d2::deform_psroi_pool": _pooling(7),
}


def register_flop_handles() -> None:
    """Adds `HANDLES` to those with which every `FlopCountAnalysis` starts."""
    # An import statement would give the function of fvcore.nn that has the same name as the module.
    importlib.import_module("fvcore.nn.flop_count")._DEFAULT_SUPPORTED_OPS.update(HANDLES)
