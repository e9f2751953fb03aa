# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Reads a file of weights of any kind, and checks that weights are finite numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from .mmdet import unwrap_state_dict
from .names import shown
from .provenance import CLASS_NAMES, convert_checkpoint, read_class_names, recognise, warn_of_v1
from .reader import read_checkpoint


def read_weights(path: str) -> dict[str, Any]:
    """Reads a file of Detectron2, of DCNCheckpointer, of Caffe2 or pycls, of MMDetection or torchvision.

    Returns:
        What Detectron2's checkpointer expects: "model", and where there are any "matching_heuristics", "__author__",
        "class_names", and what training has left. Detectors of MMDetection and ResNets of torchvision are converted.

    Raises:
        ValueError, OSError: As `read_checkpoint`. Or the file has MMDetection's names but is not one of its detectors.
    """
    checkpoint = read_checkpoint(path)
    if isinstance(checkpoint.get("model_state"), Mapping):  # of pycls
        weights = {n: v for n, v in checkpoint["model_state"].items() if not str(n).endswith("num_batches_tracked")}
        return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
    if not isinstance(checkpoint.get("model"), Mapping) and _is_caffe2(checkpoint, path):
        blobs = checkpoint["blobs"] if isinstance(checkpoint.get("blobs"), Mapping) else checkpoint
        weights = {name: value for name, value in blobs.items() if not str(name).endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
    weights = _unwrap(checkpoint, path)
    if provenance := recognise(weights):
        warn_of_v1(provenance, path)
        return _with_class_names(convert_checkpoint(weights, path), checkpoint)
    if isinstance(checkpoint.get("model"), Mapping):
        return checkpoint | {"model": weights}
    return {"model": weights}


def convert_file(path: str) -> dict[str, Any]:
    """Reads a file of MMDetection or torchvision, checks its weights, and converts them; see `convert_checkpoint`.

    Raises:
        ValueError, OSError: As `read_checkpoint`, `check_weights` and `convert_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    weights = _unwrap(checkpoint, path)
    check_weights(weights, path)
    return _with_class_names(convert_checkpoint(weights, path), checkpoint)


def _with_class_names(converted: dict[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Gives a converted file the names of classes that the original says, if it says any."""
    names = read_class_names(checkpoint)
    return converted | ({CLASS_NAMES: list(names)} if names else {})


def read_state_dict(path: str) -> dict[str, Any]:
    """Reads the weights of a file by their names there, without what training puts around them, and checks them.

    Raises:
        ValueError, OSError: As `read_checkpoint`, `unwrap_state_dict` and `check_weights`.
    """
    weights = _unwrap(read_checkpoint(path), path)
    check_weights(weights, path)
    return weights


def _unwrap(checkpoint: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Does what `unwrap_state_dict` does, with errors that name the file."""
    try:
        return dict(unwrap_state_dict(checkpoint))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _is_caffe2(checkpoint: Mapping[str, Any], path: str) -> bool:
    """Whether a file is of Caffe2, as Detectron2 decides: a pickle of arrays without an author."""
    if isinstance(checkpoint.get("blobs"), Mapping):
        return True
    return str(path).endswith(".pkl") and any(isinstance(value, np.ndarray) for value in checkpoint.values())


def check_weights(
    weights: Mapping[str, Any],
    origin: str,
    may_be_integer: Callable[[str], bool] = lambda name: name.endswith("num_batches_tracked"),
) -> None:
    """Checks that weights are finite floating-point numbers.

    Args:
        weights: tensors or arrays by name.
        origin: names the file in messages.
        may_be_integer: tells by its name whether an entry may hold integers or truth values.

    Raises:
        ValueError: Some are not; the message names them.
    """
    problems = []
    for name, value in weights.items():
        if problem := _problem(value, may_be_integer(str(name))):
            problems.append(f"{shown(name)} {problem}")
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        listed = "\n  ".join([*problems[:20], *more])
        raise ValueError(
            f"{origin} is refused, {len(problems)} of its {len(weights)} entries are not weights:\n  {listed}"
        )


def _problem(value: object, may_be_integer: bool) -> str:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, torch.Tensor):
        return f"is of type {type(value).__name__}, not a tensor"
    if value.is_quantized or value.is_sparse or value.is_meta:
        return "is a quantised, sparse or meta tensor; save its dequantised or dense values"
    if value.is_complex():
        return f"is of type {str(value.dtype).removeprefix('torch.')}; weights are real"
    if not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        return "" if may_be_integer else f"is of type {kind}; weights are floating-point numbers"
    if value.dtype.itemsize == 1:  # float8, for which torch has no isfinite
        value = value.float()
    if not torch.isfinite(value).all():
        count = int((~torch.isfinite(value)).sum())
        return f"holds NaN or infinite values ({count} of {value.numel()})"
    return ""


_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype, torch.device, torch.Size)


def as_data(value: object, place: str) -> Any:
    """Turns what is to be saved into what `read_checkpoint` reads: numbers and arrays of NumPy are converted.

    Args:
        value: what is to be saved.
        place: names it in messages.

    Raises:
        ValueError: It is, or contains, an object of another type.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_quantized or value.layout != torch.strided:
            raise ValueError(f"{place} cannot be saved: it is a {_type(value)}; save its plain, dense values")
        return value
    if isinstance(value, np.generic):
        return as_data(value.item(), place)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc":
            raise ValueError(f"{place} cannot be saved: it is an array of {value.dtype}; save its list")
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Mapping):
        converted = {as_data(key, f"a key of {place}"): as_data(v, f"{place}[{key!r}]") for key, v in value.items()}
        if not isinstance(value, OrderedDict):
            return converted
        ordered = OrderedDict(converted)
        if hasattr(value, "_metadata"):  # the versions of the layers of a state dict
            ordered._metadata = value._metadata  # type: ignore[attr-defined]
        return ordered
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [as_data(item, f"{place}[{i}]") for i, item in enumerate(value)]
        return next(kind(items) for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
    raise ValueError(
        f"{place} cannot be saved: it is a {_type(value)}, and a checkpoint holds only tensors, arrays, numbers, text "
        "and containers of them, so that it can be read without running code. Save its str() or its state_dict()"
    )


def _type(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
