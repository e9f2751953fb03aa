# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Reads files of weights as data, and never as code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

from .files import CorruptCheckpointError, check_digest
from .formats import read_file
from .names import shown
from .stand_ins import Ignored, NotDataError, Unusable


def read_checkpoint(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Reads a checkpoint as data, onto the CPU: tensors, arrays, containers, text and numbers, and never code.

    Takes both formats of PyTorch and the pickles of Detectron2's zoo, whatever the file is called. The checksums of
    PyTorch's newer format are compared, and so is the digest that a file may have at the end of its name. Reading
    takes time and memory in proportion to the size of the file, whatever the file says about itself.

    Raises:
        CorruptCheckpointError: The file is truncated, corrupted, or not a checkpoint.
        ValueError: It holds objects of other types, which could run code when they are read.
        OSError: It cannot be opened.
    """
    check_digest(path)
    return _read(path, values=True)


def peek(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Reads a checkpoint without the values of its tensors, which are on the device "meta": a matter of milliseconds.

    Raises:
        ValueError, OSError: As `read_checkpoint`, but damaged values are not found.
    """
    return _read(path, values=False)


def _read(path: str | os.PathLike[str], values: bool) -> dict[Any, Any]:
    with open(path, "rb") as file:
        try:
            checkpoint = read_file(file, values)
        except NotDataError as refused:
            raise ValueError(_refusal(path, shown(refused))) from None
        except MemoryError:  # the machine is at fault, not the file
            raise
        except Exception as error:  # damaged files make pickle, zipfile and torch raise errors of a dozen types
            raise CorruptCheckpointError(_damage(path, error)) from error
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        what = "nothing" if isinstance(checkpoint, Mapping) else f"a {type(checkpoint).__name__}"
        raise CorruptCheckpointError(f"{path} is not a checkpoint: it holds {what} instead of named weights")
    left_over = {key: what for key, value in checkpoint.items() if (what := _left_over(key, value))}
    if left_over and ("state_dict" in left_over or "state_dict" not in checkpoint):
        listed = "; ".join([*left_over.values()][:5])
        raise ValueError(
            f"{path} is refused: {listed}. Only tensors, arrays, text, numbers and containers of them are read"
        )
    return {key: value for key, value in checkpoint.items() if key not in left_over}


def _left_over(name: object, value: object) -> str:
    """Names the first thing at or below an entry that is not a tensor, an array, text or a number; "" if all are."""
    seen: set[int] = set()
    waiting = [(str(name), value)]
    while waiting:
        place, item = waiting.pop()
        if isinstance(item, (Unusable, Ignored)):
            return f"{shown(place)} is {shown(item.kind)}"
        if isinstance(item, (Mapping, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            pairs = item.items() if isinstance(item, Mapping) else enumerate(item)
            waiting += [(f"{place}.{key}", below) for key, below in pairs]
    return ""


def _refusal(path: str | os.PathLike[str], what: str) -> str:
    return (
        f"{path} is refused: it holds more than weights, namely {what}, and reading that could run code of whoever "
        "wrote the file. If you trust its origin, read it with torch.load(..., weights_only=False) or pickle.load "
        "yourself and save its state dict alone"
    )


def _damage(path: str | os.PathLike[str], error: Exception) -> str:
    if isinstance(error, RecursionError):
        reason = "its containers are nested too deep"
    elif error.args and type(error.args[0]) is int or isinstance(error, pickle.UnpicklingError):
        reason = "its pickle is damaged, or it has none"  # its bytes were taken for the operations of a pickle
    else:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
    size = os.path.getsize(path)
    return f"{path} ({size} bytes) is truncated, corrupted, or not a checkpoint of PyTorch or Detectron2: {reason}"
