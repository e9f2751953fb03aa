# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A switch for exporters: the operators are recorded as operators that other runtimes know, instead of our own."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_switched_on: ContextVar[bool] = ContextVar("portable_operators", default=False)


@contextmanager
def portable_operators() -> Iterator[None]:
    """Within it, the operators of dcn_d2 call operators that ONNX, TensorRT and OpenVINO know.

    A model that is traced or exported within it does not need dcn_d2 where it runs. Deformable convolution becomes
    `torchvision::deform_conv2d`. The RoI poolings become `torchvision::roi_align` and arithmetic. Values are the same
    up to rounding, but PyTorch computes them more slowly. `torch.onnx.export` switches it on by itself.

    It needs torchvision, holds for the thread that enters it, and is about new recordings: a model that has been
    scripted by `torch.jit.script` keeps the operators of dcn_d2.

    Example:
        >>> import torch
        >>> from dcn_d2.layers import DeformConvPack
        >>> from dcn_d2.ops import portable_operators
        >>> with portable_operators():
        ...     program = torch.export.export(DeformConvPack(4, 8, 3), (torch.rand(1, 4, 5, 6),))
        >>> [str(node.target) for node in program.graph.nodes if "deform" in str(node.target)]
        ['torchvision.deform_conv2d.default']
    """
    token = _switched_on.set(True)
    try:
        yield
    finally:
        _switched_on.reset(token)


def are_portable() -> bool:
    """Whether the operators are to be recorded as those that other runtimes know."""
    # That an ONNX export goes on is asked only where something is recorded: the answer takes 4 us.
    return _switched_on.get() or (
        (torch.jit.is_tracing() or torch.compiler.is_exporting()) and torch.onnx.is_in_onnx_export()
    )


def can_check() -> bool:
    """Whether operands can be checked by `_arguments.check`: not while torch.jit.trace or Dynamo records the checks."""
    return not (torch.jit.is_tracing() or torch.compiler.is_dynamo_compiling())


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
    """Calls `torchvision::deform_conv2d` with operands that `dcn_d2.ops.deform_conv2d` would take.

    Raises:
        ImportError: torchvision, which has the operator, is missing.
    """
    load_torchvision()
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        _teach_tracing_exporter()
    groups = input.shape[1] // weight.shape[1]
    deform_groups = offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])
    use_mask = mask is not None
    if mask is None:  # torchvision's operator takes no None, and compares the batch
        mask = input.new_zeros(input.shape[0], 1)
    return torch.ops.torchvision.deform_conv2d(
        input,
        weight,
        offset,
        mask,
        weight.new_zeros(weight.shape[0]) if bias is None else bias,
        *stride,
        *padding,
        *dilation,
        int(groups),  # while torch.jit.trace records, sizes are tensors, but no exporter takes a number that is one
        int(deform_groups),
        use_mask,
    )


def load_torchvision() -> None:
    """Imports torchvision, which has the operators, outside of any recording: it calls one of them when imported.

    Raises:
        ImportError: it cannot be imported.
    """
    if sys.modules.get("torchvision") is not None:
        return
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "within portable_operators() and torch.onnx.export, the operators of dcn_d2 are torchvision's, but "
            f"torchvision cannot be imported: {error}. Install it: pip install torchvision"
        ) from error
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


@functools.cache
def _teach_tracing_exporter() -> None:
    """Tells `torch.onnx.export(dynamo=False)` what torchvision's operator is in ONNX. The other exporter knows it."""
    from torch.onnx.symbolic_helper import parse_args

    @parse_args(*"vvvvv", *"iiiiiiiii")
    def translate(
        g: Any,
        input: Any,
        weight: Any,
        offset: Any,
        mask: Any,
        bias: Any,
        stride_h: int,
        stride_w: int,
        pad_h: int,
        pad_w: int,
        dilation_h: int,
        dilation_w: int,
        groups: int,
        deform_groups: int,
        use_mask: int,
    ) -> Any:
        return g.op(
            "DeformConv",
            *(input, weight, offset, bias, *([mask] if use_mask else [])),
            dilations_i=[dilation_h, dilation_w],
            group_i=groups,
            offset_group_i=deform_groups,
            pads_i=[pad_h, pad_w, pad_h, pad_w],
            strides_i=[stride_h, stride_w],
        )

    torch.onnx.register_custom_op_symbolic("torchvision::deform_conv2d", translate, 19)
