# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Ways in which a tensor can lie in memory, and what the operators promise for each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .samples import Sample, operands_of


def _permuted(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The same values, with dimensions in memory in that order, the outermost first."""
    return tensor.permute(*order).contiguous().permute(*(order.index(d) for d in range(tensor.dim())))


def _cut_out(tensor: Tensor, starts: Sequence[int], steps: Sequence[int], order: Sequence[int]) -> Tensor:
    """The same values as a part of a larger tensor whose memory has that order: all else is NaN."""
    sizes = [start + step * size + 1 for start, step, size in zip(starts, steps, tensor.shape)]
    larger = _permuted(tensor.new_full(sizes, torch.nan), order)
    part = larger[tuple(slice(a, a + step * n, step) for a, step, n in zip(starts, steps, tensor.shape))]
    return part.copy_(tensor)


def contiguous(tensor: Tensor, _: random.Random) -> Tensor:
    """As torch makes tensors."""
    return tensor.contiguous()


def channels_last(tensor: Tensor, _: random.Random) -> Tensor:
    """Channels side by side; of other than four dimensions the last one outermost."""
    if tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return _permuted(tensor, list(reversed(range(tensor.dim()))))


def permuted(tensor: Tensor, choose: random.Random) -> Tensor:
    """Dense, with dimensions in any order."""
    return _permuted(tensor, choose.sample(range(tensor.dim()), tensor.dim()))


def some_channels(tensor: Tensor, choose: random.Random) -> Tensor:
    """A part of the channels of a channels_last or contiguous map."""
    dimensions = tensor.dim()
    order = [0, *range(2, dimensions), 1] if dimensions > 1 and choose.random() < 0.7 else list(range(dimensions))
    starts = [0] * dimensions
    starts[min(1, dimensions - 1)] = choose.randint(0, 3)
    return _cut_out(tensor, starts, [1] * dimensions, order)


def cut_out(tensor: Tensor, choose: random.Random) -> Tensor:
    """A part of a larger tensor in all dimensions, of which some have steps."""
    order = choose.sample(range(tensor.dim()), tensor.dim()) if choose.random() < 0.5 else list(range(tensor.dim()))
    starts, steps = ([choose.choice(values) for _ in tensor.shape] for values in ((0, 1, 2), (1, 1, 2)))
    return _cut_out(tensor, starts, steps, order)


def expanded(tensor: Tensor, choose: random.Random) -> Tensor:
    """Values that repeat along some dimensions, with stride 0: those of the first place."""
    repeated = [choose.random() < 0.5 for _ in tensor.shape]
    kept = tensor[tuple(slice(0, 1) if repeat else slice(None) for repeat in repeated)].clone()
    return kept.expand(tensor.shape)


def negative_bit(tensor: Tensor, choose: random.Random) -> Tensor:
    """Negated when it is read, as the imaginary part of a conjugate is; in any order in memory."""
    return torch._neg_view(permuted(-tensor, choose))


def odd_strides_of_ones(tensor: Tensor, choose: random.Random) -> Tensor:
    """Dense, and dimensions of size 1 have strides that mean nothing."""
    dense = channels_last(tensor, choose) if choose.random() < 0.5 else tensor.contiguous()
    strides = [choose.choice([0, 1, 3, 64]) if n == 1 else stride for n, stride in zip(dense.shape, dense.stride())]
    return dense.as_strided(dense.shape, strides)


def shifted(tensor: Tensor, choose: random.Random) -> Tensor:
    """Aligned to no more than an element."""
    dense = permuted(tensor, choose)
    return dense.new_empty(dense.numel() + 1).as_strided(dense.shape, dense.stride(), 1).copy_(dense)


Layout = Callable[[Tensor, random.Random], Tensor]
LAYOUTS: dict[str, Layout] = {
    layout.__name__: layout
    for layout in (
        contiguous,
        channels_last,
        permuted,
        some_channels,
        cut_out,
        expanded,
        negative_bit,
        odd_strides_of_ones,
        shifted,
    )
}


def arrange(operands: dict[str, Any], choose: random.Random, layout: str | None = None) -> dict[str, Any]:
    """Lays every tensor out, by `layout` or each by any. Values stay, except those that `expanded` repeats."""
    return {
        name: LAYOUTS[layout or choose.choice(list(LAYOUTS))](value, choose)
        if isinstance(value, Tensor) and value.dim()
        else value
        for name, value in operands.items()
    }


def turned_columns(tensor: Tensor) -> Tensor:
    """A tensor of one column, in memory a row: contiguous, with another stride for columns than for rows."""
    row = tensor.transpose(2, 3)
    turned = torch.empty_like(row, memory_format=torch.contiguous_format).copy_(row).transpose(2, 3)
    assert turned.is_contiguous() and turned.stride(3) != turned.stride(2)
    return turned


def off_by_one_element(tensor: Tensor) -> Tensor:
    """The same values and strides, where memory is aligned to no more than an element."""
    return tensor.new_empty(tensor.numel() + 1).as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


def describe(tensor: Tensor) -> tuple[list[int], tuple[int, ...], torch.dtype]:
    """What a fake kernel promises of a result."""
    return list(tensor.shape), tensor.stride(), tensor.dtype


def as_tuple(results: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def promised(operator: Callable[..., Any], arguments: Sequence[Any]) -> list[tuple[Any, ...]]:
    """What the fake kernel of `operator` promises for operands that lie as these do."""
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in arguments]
        return [describe(result) for result in as_tuple(operator(*fake))]


def arguments_of(operator: str, values: dict[str, Any]) -> list[Any]:
    """All arguments of an operator in order; those not given have their defaults."""
    schema = getattr(torch.ops.dcn_d2, operator).default._schema
    return [values.get(argument.name, argument.default_value) for argument in schema.arguments]


def calls(
    operator: str, sample: Sample, dtype: torch.dtype, device: str, choose: random.Random, layout: str | None
) -> Iterator[tuple[Any, list[Any]]]:
    """The operator and its backward, each with its arguments."""
    values = arrange(operands_of(operator, sample, dtype, device) | sample.arguments, choose, layout)
    forward = getattr(torch.ops.dcn_d2, operator).default
    arguments = arguments_of(operator, values)
    yield forward, arguments
    shape = promised(forward, arguments)[0][0]
    grad = arrange({"grad": torch.randn(shape).to(device, dtype)}, choose, layout)
    named = dict(zip((argument.name for argument in forward._schema.arguments), arguments))
    for needed in (True, False):
        wanted = {"need_input": True, "need_offset": needed, "need_weight": needed, "deterministic": False}
        backward = getattr(torch.ops.dcn_d2, f"{operator}_backward").default
        yield backward, arguments_of(f"{operator}_backward", named | grad | wanted)
