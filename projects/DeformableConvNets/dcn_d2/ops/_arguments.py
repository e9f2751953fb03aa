# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Argument forms that the operators share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

IntPair = int | Sequence[int]

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def pair(value: IntPair, name: str) -> list[int]:
    """Gives [height, width] for a number or a pair of numbers.

    Raises:
        ValueError: ``value`` is neither.
    """
    values = [value, value] if isinstance(value, (int, torch.SymInt)) else list(value)
    if len(values) != 2:
        raise ValueError(f"{name} must be a number or a pair of numbers, got {value}")
    return values


def new_empty_in_format_of(input: Tensor, shape: Sequence[int]) -> Tensor:
    """Gives what a kernel allocates: channels_last where `input` is, else contiguous."""
    empty = input.new_empty(shape)
    return empty.contiguous(memory_format=torch._prims_common.suggest_memory_format(input))


def check(condition: object, message: Callable[[], str]) -> None:
    """Raises RuntimeError with the message unless the condition holds; understands symbolic sizes."""
    torch._check(condition, message)  # type: ignore[arg-type]


def check_tensor(operator: str, name: str, tensor: Tensor, like: Tensor, rank: int) -> None:
    """Checks one operand's rank, and its dtype and device against those of ``input``."""
    check(tensor.dim() == rank, lambda: f"{operator}: {name} must have {rank} dimensions, got {list(tensor.shape)}")
    check(
        tensor.dtype == like.dtype,
        lambda: f"{operator}: {name} has dtype {tensor.dtype}, but input has {like.dtype}",
    )
    check(
        tensor.device == like.device,
        lambda: f"{operator}: {name} is on {tensor.device}, but input is on {like.device}",
    )


def check_shape(operator: str, name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    """Checks one operand's shape."""
    check(
        len(tensor.shape) == len(expected) and all(a == b for a, b in zip(tensor.shape, expected)),
        lambda: f"{operator}: {name} must have shape {list(expected)}, got {list(tensor.shape)}",
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
            0 <= image < input.shape[0],
            lambda: f"{operator}: rois[{row}] names image {image}, but input has {input.shape[0]} images",
        )
