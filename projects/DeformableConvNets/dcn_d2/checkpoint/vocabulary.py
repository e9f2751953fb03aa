# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The names that a pickle may use, and what each of them gives. All others are refused."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .stand_ins import Array, DamagedError, DType, Ignored, StorageType, Unusable, as_array, as_numbers


def _scalar(dtype: object, content: object = b"") -> object:
    value = as_array(content, dtype, (), "C")
    return value if isinstance(value, Unusable) else value.item()


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise DamagedError("bytes are written in an unknown way")
    return text.encode("latin1")


def _mapping(make: Callable[..., Any]) -> Callable[..., Any]:
    def build(*args: Any) -> Any:
        made = make()
        for arg in args:
            if not isinstance(arg, (Mapping, list, tuple)):
                raise DamagedError("a dictionary is made of something else")
            for key, value in arg.items() if isinstance(arg, Mapping) else arg:
                check_key(key)
                made[key] = value
        return made

    return build


def make_set(values: object = ()) -> set:
    """A set of entries that `check_key` allows."""
    if not isinstance(values, (list, tuple)):
        raise DamagedError("a set is made of something else")
    for value in values:
        check_key(value)
    return set(values)


def check_key(key: object) -> None:
    """Allows only numbers, text and tuples of them: the hash of deep containers can crash Python."""
    parts = key if isinstance(key, tuple) else (key,)
    if not all(part is None or isinstance(part, (str, bytes, int, float)) for part in parts):
        raise DamagedError("a dictionary or set has an entry with a name that is neither text nor a number")


class Maker:
    """What a name in a pickle stands for."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make


def _ignored(*args: object, **kwargs: object) -> Ignored:
    return Ignored()


def _unusable(kind: str) -> Maker:
    return Maker(lambda *args, **kwargs: Unusable(kind))


_STORAGES = {
    **{
        f"{name}Storage": StorageType(dtype)
        for name, dtype in {
            **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
            **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
            **{"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
            "Untyped": torch.uint8,
        }.items()
    },
    **{f"{name}Storage": StorageType(torch.uint8, quantised=True) for name in ("QInt8", "QUInt8", "QUInt4x2")},
    **{f"{name}Storage": StorageType(torch.uint8, quantised=True) for name in ("QUInt2x4",)},
    "QInt32Storage": StorageType(torch.int32, quantised=True),
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}

TABLE: dict[str, Any] = {
    "collections.OrderedDict": Maker(_mapping(OrderedDict)),
    "collections.Counter": Maker(_mapping(Counter)),
    "collections.defaultdict": Maker(lambda *args: defaultdict(None)),
    "builtins.set": Maker(make_set),
    "builtins.dict": Maker(_mapping(dict)),
    "builtins.list": Maker(lambda *args: list(args)),
    "builtins.int": Maker(_ignored),
    "builtins.bytearray": Maker(lambda value=b"", *rest: bytearray(value if isinstance(value, bytes) else b"")),
    "builtins.complex": Maker(lambda real=0.0, imaginary=0.0: complex(float(real), float(imaginary))),
    "_codecs.encode": Maker(_encode),
    "torch.serialization._get_layout": Maker(lambda *args: None),  # sparse tensors name it
    **{str(value): None for value in vars(torch).values() if isinstance(value, torch.qscheme)},
    "torch.Size": Maker(lambda values=(): as_numbers(values)),
    "torch.device": Maker(lambda *args: ":".join(str(arg) for arg in args if isinstance(arg, (str, int)))),
    **{f"torch.{name}": storage for name, storage in _STORAGES.items()},
    "torch.storage.UntypedStorage": _STORAGES["UntypedStorage"],
    **_DTYPES,
    "torch._utils._rebuild_qtensor": _unusable("a quantised tensor"),
    "torch._utils._rebuild_sparse_tensor": _unusable("a sparse tensor"),
    "torch._utils._rebuild_nested_tensor": _unusable("a nested tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _unusable("a tensor of device meta, without values"),
    **{
        f"numpy.{core}.multiarray.{name}": maker
        for core in ("core", "_core")
        for name, maker in {"_reconstruct": Maker(lambda *args: Array()), "scalar": Maker(_scalar)}.items()
    },
    **{f"numpy.{core}.numeric._frombuffer": Maker(as_array) for core in ("core", "_core")},
    "numpy.ndarray": Maker(lambda *args: Array()),
    "numpy.dtype": Maker(lambda name="", *rest: DType(name if isinstance(name, str) else "objects")),
    # MMDetection 3.x leaves the history of the losses in its training checkpoints, with bound methods of it.
    "mmengine.logging.history_buffer.HistoryBuffer": Maker(_ignored),
    "builtins.getattr": Maker(_ignored),
}
