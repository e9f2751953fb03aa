# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the operators share about their arguments: conversion, checks, and the one rule of memory formats."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import is_tensor_like

IntPair = int | Sequence[int]

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _index(value: Any) -> Any:
    """Gives an integer of any kind as Python's own, symbolic ones as they are, and None for everything else."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    # A truth value is an integer to Python and to torch, but never what was meant.
    if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # torch raises the second for a tensor while tracing
        return None


def integer(value: Any, name: str) -> int:
    """Gives an integer of any kind, such as one of numpy's, as Python's own; symbolic ones stay as they are.

    Raises:
        ValueError: ``value`` is not an integer. True, False and 1.0 do not count as integers.
    """
    if type(value) is int:
        return value
    found = _index(value)
    if found is None:
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return found


def number(value: Any, name: str) -> float:
    """Gives a real number of any kind, such as one of numpy's, as Python's float; symbolic ones stay as they are.

    Raises:
        ValueError: ``value`` is not a real number. True and False do not count as numbers.
    """
    if type(value) is float or isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]
    if not isinstance(value, (bool, str, bytes)) and hasattr(value, "__float__"):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):  # an array of several numbers, or a tensor while tracing
            pass
    raise ValueError(f"{name} must be a number, got {value!r}")


def pair(value: IntPair, name: str) -> list[int]:
    """Gives [height, width] for an integer or a pair of integers, of any kind.

    Raises:
        ValueError: ``value`` is neither.
    """
    # Nearly every call has one of these two forms. What follows would take a tenth of the time of a small operator.
    if type(value) is int:
        return [value, value]
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return [value[0], value[1]]
    values: Any = value if isinstance(value, (list, tuple)) else None
    if values is None:
        single = _index(value)
        if single is not None:
            return [single, single]
        # A 0-d array has the method __iter__ too.
        iterable = hasattr(value, "__iter__") and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) > 0
        values = value if iterable else [value]
    found = [_index(each) for each in values]
    height_and_width = [each for each in found if each is not None]
    if len(found) != 2 or len(height_and_width) != 2:
        raise ValueError(f"{name} must be a number or a pair of numbers, got {value!r}")
    return height_and_width


def integer_or_pair(value: IntPair, name: str) -> int | tuple[int, int]:
    """Gives an integer for an integer, else a pair, of any kind of integers.

    Raises:
        ValueError: ``value`` is neither.
    """
    height, width = pair(value, name)
    return height if _index(value) is not None else (height, width)


def are_tensors(required: Sequence[Any], optional: Sequence[Any]) -> bool:
    """Whether operands are plain tensors, or None where that is allowed.

    A quick test for every call. Where it fails, `check_types` finds out whether the call is wrong.
    """
    plain = True
    for value in required:
        plain = plain and isinstance(value, Tensor)
    for value in optional:
        plain = plain and (value is None or isinstance(value, Tensor))
    return plain


def check_types(operator: str, optional: Sequence[str] = (), **operands: Any) -> None:
    """Checks that operands are tensors, or None where that is allowed.

    Raises:
        TypeError: one is not; the message names it and its type.
    """
    for name, value in operands.items():
        if isinstance(value, Tensor) or is_tensor_like(value) or (value is None and name in optional):
            continue
        kind = "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"
        kind = kind.replace("builtins.", "")
        way_out = "" if value is None else "; torch.as_tensor makes a tensor of numbers"
        allowed = "a tensor or None" if name in optional else "a tensor"
        raise TypeError(f"{operator}: {name} must be {allowed}, got {kind}{way_out}")


def is_channels_last(tensor: Tensor) -> bool:
    """Whether what is computed from (N, C, H, W) `tensor` is channels_last; else it is contiguous.

    This is the one rule of memory formats. `is_channels_last` in csrc/tensor.h repeats it for the kernels. A tensor is
    channels_last if the channels of each pixel lie side by side, and pixels, rows and images follow each other. Gaps
    between pixels are allowed, as in some channels of a channels_last map. The strides of dimensions of size 1 do not
    count, since compilers do not keep them; torch's own rule counts them. So a tensor of one channel or one pixel is
    contiguous.
    """
    if tensor.dim() != 4 or tensor.layout != torch.strided:
        return False
    sizes, strides = tensor.shape, tensor.stride()
    if not _surely(strides[1] == 1) or _surely(sizes[1] < 2) or _surely(sizes[2] * sizes[3] < 2):
        return False
    least = sizes[1]
    for dimension in (3, 2, 0):
        size, stride = sizes[dimension], strides[dimension]
        if isinstance(size, int) and size < 2:
            continue
        # The stride comes first: while tracing, a dense map's stride is known even where its sizes are not.
        if _surely(stride >= least):
            least = stride * size
        elif not _surely(size < 2):
            return False
    return True


def _surely(condition: bool | torch.SymBool) -> bool:
    """Whether a condition is known to hold; False if it depends on sizes that are not known while tracing."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # takes a while to import

    return guard_or_false(condition)


def new_empty_in_format_of(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Allocates as a kernel does: channels_last if `is_channels_last(like)`, else contiguous."""
    memory_format = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def in_strides_of(promised: Tensor, values: Tensor) -> Tensor:
    """Gives `values` with the dtype and the strides of `promised`, whose own values are not used."""
    if values.dtype == promised.dtype and values.stride() == promised.stride():
        return values
    return promised.copy_(values)


def check(condition: object, message: Callable[[], str]) -> None:
    """Raises RuntimeError with the message unless the condition holds, which may be about symbolic sizes."""
    torch._check(condition, message)  # type: ignore[arg-type]


def check_layout(operator: str, name: str, tensor: Tensor) -> None:
    """Checks that an operand is a plain dense tensor, not a sparse, quantized, nested or mkldnn one."""
    kind = str(tensor.layout)
    if tensor.layout == torch.strided:
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else ""
    check(not kind, lambda: f"{operator}: {name} must be a dense tensor, got a {kind} one; to_dense() may make it one")


def check_tensor(operator: str, name: str, tensor: Tensor, like: Tensor, rank: int) -> None:
    """Checks one operand's layout and rank, and its dtype and device against those of ``input``."""
    check_layout(operator, name, tensor)
    check(tensor.dim() == rank, lambda: f"{operator}: {name} must have {rank} dimensions, got {list(tensor.shape)}")
    check(
        tensor.dtype == like.dtype,
        lambda: f"{operator}: {name} has dtype {tensor.dtype}, but input has {like.dtype}",
    )
    check(
        tensor.device == like.device,
        lambda: f"{operator}: {name} is on {tensor.device}, but input is on {like.device}",
    )


def check_positions(operator: str, name: str, tensor: Tensor, input: Tensor) -> None:
    """Checks offsets or a mask. On CPU they may be float32 where the input is of half precision."""
    half = input.dtype in (torch.float16, torch.bfloat16) and input.device.type != "cuda"
    mixed = half and tensor.dtype == torch.float32
    check_tensor(operator, name, tensor, tensor if mixed else input, 4)
    check(
        tensor.device == input.device,
        lambda: f"{operator}: {name} is on {tensor.device}, but input is on {input.device}",
    )


def check_shape(operator: str, name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    """Checks one operand's shape."""

    def message() -> str:
        return f"{operator}: {name} must have shape {list(expected)}, got {list(tensor.shape)}"

    check(len(tensor.shape) == len(expected), message)
    for size, wanted in zip(tensor.shape, expected):
        check(size == wanted, message)  # one by one: sizes that are not known while tracing are compared at run time


def check_least(operator: str, name: str, values: Sequence[int], least: int) -> None:
    """Checks a (height, width) pair of numbers against the least that both may be."""
    check(
        min(values) >= least,
        lambda: f"{operator}: {name} must be two numbers of at least {least}, got {list(values)}",
    )


def check_input_dtype(operator: str, input: Tensor) -> None:
    """Checks that ``input`` has one of the four supported dtypes."""
    check(
        input.dtype in FLOAT_DTYPES,
        lambda: f"{operator}: input must be float64, float32, float16 or bfloat16, got {input.dtype}",
    )


def check_rois(operator: str, rois: Tensor, input: Tensor, batch_index: bool = False) -> None:
    """Checks (R, 5) RoIs, and where `batch_index` is set that each names one of input's images."""
    half = input.dtype in (torch.float16, torch.bfloat16)
    check_tensor(operator, "rois", rois, input.float() if half and rois.dtype == torch.float32 else input, 2)
    check(rois.shape[1] == 5, lambda: f"{operator}: rois must have shape [R, 5], got {list(rois.shape)}")
    for row, image in enumerate(rois[:, 0].tolist() if batch_index else ()):
        check(
            0 <= image < input.shape[0] and image == int(image),
            lambda: f"{operator}: rois[{row}] names image {image:g}, but input has {input.shape[0]} images",
        )
