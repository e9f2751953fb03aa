# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What stands in, while a pickle is read, for the objects of PyTorch and NumPy that it describes.

Nothing here is an object that a pickle could choose: each class holds checked numbers, text or values, and no code.
"""

from __future__ import annotations

import math
import re

import numpy as np
import torch


class NotDataError(Exception):
    """A pickle names something that is not data; the text of the error is that name."""


class DamagedError(Exception):
    """A file says something about itself that cannot be true."""


class Ignored:
    """Stands in for an object of a training run that is left in a checkpoint; holds nothing and does nothing."""

    kind = "an object of MMEngine"


class Unusable:
    """Stands in for a tensor or an array of a kind that is not read; `kind` says which."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


class Storage:
    """Values of one type in a row, which several tensors may share."""

    def __init__(self, values: torch.Tensor, quantised: bool = False) -> None:
        self.values, self.quantised = values, quantised


class StorageType:
    """A class of storages, of which only the type of its values matters."""

    def __init__(self, dtype: torch.dtype, quantised: bool = False) -> None:
        self.dtype, self.quantised = dtype, quantised

    def size_of(self, count: object) -> int:
        """How many bytes `count` values take."""
        if type(count) is not int or count < 0:
            raise DamagedError(f"a storage has {count!r} values")
        return count * self.dtype.itemsize


class DType:
    """A type of NumPy's numbers, by its name and its order of bytes."""

    def __init__(self, name: str) -> None:
        self.name, self.order = name, "="

    def build(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]

    def resolve(self) -> np.dtype | None:
        """NumPy's type; None for text, objects and records."""
        plain = re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)", self.name)
        return np.dtype(self.order + plain[1]) if plain else None


class Array:
    """An array whose content the pickle gives later."""

    def __init__(self) -> None:
        self.value: np.ndarray | Unusable | None = None

    def build(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise DamagedError("an array has no content")
        _, shape, dtype, fortran, content = state
        self.value = as_array(content, dtype, shape, "F" if fortran else "C")


def as_array(content: object, dtype: object, shape: object, order: object) -> np.ndarray | Unusable:
    """The array of these bytes; `Unusable` if it holds other things than numbers."""
    resolved = dtype.resolve() if isinstance(dtype, DType) else None
    if resolved is None:
        return Unusable(f"an array of {getattr(dtype, 'name', 'objects')}")
    if isinstance(content, str):  # as Python 2 wrote bytes
        content = content.encode("latin1")
    shape = as_numbers(shape)
    if not isinstance(content, (bytes, bytearray)) or len(content) != math.prod(shape) * resolved.itemsize:
        raise DamagedError(f"an array of shape {list(shape)} does not have as many bytes")
    values = np.frombuffer(content, resolved).reshape(shape, order="F" if order == "F" else "C")
    return values.astype(resolved.newbyteorder("="))  # a copy, which can be written to


def as_numbers(value: object) -> tuple[int, ...]:
    """The value as the natural numbers of a shape, a stride or an offset, which it has to be."""
    if not isinstance(value, (tuple, list)) or not all(type(v) is int and 0 <= v < 1 << 62 for v in value):
        raise DamagedError("a shape, a stride or an offset is not a whole number from 0")
    if len(value) > 32:
        raise DamagedError(f"a tensor has {len(value)} dimensions")
    return tuple(value)
