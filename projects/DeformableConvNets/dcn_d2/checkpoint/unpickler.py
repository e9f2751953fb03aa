# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A reader of pickles that knows data only: numbers, text, containers, tensors, arrays.

Nothing that a pickle names is imported or called; a name that is not in the table of `vocabulary` is refused. What a
pickle claims is compared with what the file holds before memory is taken for it.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import IO, Any

import torch

from .stand_ins import Array, DamagedError, DType, Ignored, NotDataError, Storage, StorageType, Unusable, as_numbers
from .vocabulary import TABLE, Maker, check_key, make_set

# A training checkpoint of ResNet-101 needs about 50,000 operations. The limit bounds the time that a hostile file can
# take, and the memory too: an operation takes about 200 bytes.
MAX_OPERATIONS = 400_000
MAX_DEPTH = 64
# Tensors may share values, so together they may hold more than the file: this many times its size, and bytes beyond it.
MAX_SHARING, FREE_SHARING = 8, 64 << 20


class BoundedFile:
    """A file that refuses to read more bytes than it has, before memory is taken for them."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self.size = file, size

    def remaining(self) -> int:
        return self.size - self._file.tell()

    def read(self, count: int = -1) -> bytes:
        if count > 256 and count > self.remaining():  # asking each time would take longer than reading
            raise DamagedError(f"it ends before the {count} bytes that it announces")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline()

    def fill(self, values: torch.Tensor) -> None:
        """Fills `values` with the next bytes of the file."""
        if values.nbytes and self._file.readinto(values.view(torch.uint8).numpy()) != values.nbytes:  # type: ignore
            raise DamagedError(f"it ends before the {values.nbytes} bytes that it announces")


class _Counted(dict):
    """The table of operations. It counts how many are looked up."""

    count = 0

    def __getitem__(self, key: int) -> Any:
        self.count += 1
        if self.count > MAX_OPERATIONS:
            raise DamagedError(f"it has more than {MAX_OPERATIONS:,} operations, more than any checkpoint needs")
        return super().__getitem__(key)


_Unpickler: Any = pickle._Unpickler  # the one in Python: its memory is bounded


class DataUnpickler(_Unpickler):
    """Reads one pickle.

    Args:
        file: where it begins.
        storage: gives the values that a reference of PyTorch stands for. None for plain pickles, which have none.
        payload: bytes of the values of all tensors.
    """

    dispatch: dict[int, Callable[..., None]] = dict(_Unpickler.dispatch)

    def __init__(self, file: BoundedFile, storage: Callable[[tuple], Storage] | None = None, payload: int = 0) -> None:
        super().__init__(file, encoding="latin1")  # as Detectron2 reads the text of Python 2
        self.dispatch = _Counted(self.dispatch)
        self._storage = storage
        self._budget = FREE_SHARING + MAX_SHARING * payload

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return Maker(self._tensor)
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return Maker(lambda data, *rest: data)
        if (module, name) == ("copyreg", "_reconstructor"):
            return Maker(lambda cls, *rest: self._call(cls, ()))
        try:
            return TABLE[f"{module}.{name}"]
        except KeyError:
            raise NotDataError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[:1] == ("module",) and len(pid) > 1:  # source code beside an old model
            return pid[1]
        if self._storage is None or not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise DamagedError("it refers to something outside itself")
        return self._storage(pid)

    def _tensor(self, storage: object, offset: object, size: object, stride: object, *rest: object) -> object:
        if not isinstance(storage, Storage):
            raise DamagedError("a tensor has no storage")
        if storage.quantised:
            return Unusable("a quantised tensor")
        values = storage.values
        if isinstance(dtype := rest[2] if len(rest) > 2 else None, torch.dtype):  # of the third version
            if values.nbytes % dtype.itemsize:
                raise DamagedError(f"a storage of {values.nbytes} bytes holds values of {dtype.itemsize}")
            values = values.view(torch.uint8).view(dtype)
        (offset,), size, stride = as_numbers([offset]), as_numbers(size), as_numbers(stride)
        if len(size) != len(stride):
            raise DamagedError(f"a tensor has {len(size)} sizes and {len(stride)} strides")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if count and last >= values.numel():
            raise DamagedError(f"a tensor of shape {list(size)} reaches beyond its {values.numel()} stored values")
        self._budget -= count * values.dtype.itemsize
        if self._budget < 0:
            raise DamagedError("its tensors claim to hold many times more values than the file")
        return values.as_strided(size, stride, offset)

    def _call(self, function: object, args: object, kwargs: Mapping[str, Any] | None = None) -> Any:
        if not isinstance(function, Maker) or not isinstance(args, tuple):
            raise DamagedError("it calls something that is not a function")
        return function.make(*args, **(kwargs or {}))

    # The operations below are those of `pickle`, restricted: they call what the table gives, and change only lists,
    # dictionaries, sets, and stand-ins.

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        kwargs, args = self.stack.pop(), self.stack.pop()
        if not isinstance(kwargs, dict):
            raise DamagedError("it calls something with no arguments")
        self.stack[-1] = self._call(self.stack[-1], args, kwargs)

    def load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self.append(self._call(self.find_class(module, name), tuple(self.pop_mark())))

    def load_obj(self) -> None:
        function, *args = self.pop_mark()
        self.append(self._call(function, tuple(args)))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, (DType, Array)):
            target.build(state)
        elif not isinstance(target, (OrderedDict, Ignored, Unusable)):  # a state dict has its versions as a state
            raise DamagedError(f"it gives a state to a {type(target).__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._put(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._put(self.stack[-1], items)

    @staticmethod
    def _put(target: object, items: list) -> None:
        if not isinstance(target, dict) or len(items) % 2:
            raise DamagedError(f"it gives entries to a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            check_key(key)
            target[key] = value

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend(self.stack[-1], [value])

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._extend(self.stack[-1], items)

    @staticmethod
    def _extend(target: object, items: list) -> None:
        if not isinstance(target, list):
            raise DamagedError(f"it appends to a {type(target).__name__}")
        target.extend(items)

    def load_additems(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise DamagedError(f"it adds to a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(make_set(items))

    def load_frozenset(self) -> None:
        self.append(frozenset(make_set(self.pop_mark())))

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def load_extension(self) -> None:
        raise NotDataError("an extension of pickle")


for _names, _function in {
    ("REDUCE", "NEWOBJ"): DataUnpickler.load_reduce,
    ("NEWOBJ_EX",): DataUnpickler.load_newobj_ex,
    ("INST",): DataUnpickler.load_inst,
    ("OBJ",): DataUnpickler.load_obj,
    ("BUILD",): DataUnpickler.load_build,
    ("SETITEM",): DataUnpickler.load_setitem,
    ("SETITEMS",): DataUnpickler.load_setitems,
    ("DICT",): DataUnpickler.load_dict,
    ("APPEND",): DataUnpickler.load_append,
    ("APPENDS",): DataUnpickler.load_appends,
    ("ADDITEMS",): DataUnpickler.load_additems,
    ("FROZENSET",): DataUnpickler.load_frozenset,
    ("BYTEARRAY8",): DataUnpickler.load_bytearray8,
    ("EXT1", "EXT2", "EXT4"): DataUnpickler.load_extension,
}.items():
    for _name in _names:
        DataUnpickler.dispatch[getattr(pickle, _name)[0]] = _function


def finish(tree: object) -> Any:
    """Replaces stand-ins by their arrays. Refuses containers that are nested too deep or contain themselves."""
    done: dict[int, tuple[object, object]] = {}  # id: the object, kept so that its id stays its own, and the result

    def visit(value: object, depth: int) -> object:
        if isinstance(value, Array):
            if value.value is None:
                raise DamagedError("an array has no content")
            return value.value
        if isinstance(value, (Maker, DType, Storage, StorageType)):
            return Unusable("a type, not a value")
        if not isinstance(value, (dict, list, tuple, set, frozenset)):
            return value
        if id(value) in done:
            found = done[id(value)][1]
            if found is _OPEN:
                raise DamagedError("a container in it contains itself")
            return found
        if depth > MAX_DEPTH:
            raise DamagedError(f"its containers are nested more than {MAX_DEPTH} deep")
        done[id(value)] = value, _OPEN
        result: object = value
        if isinstance(value, dict):
            for key in value:
                value[key] = visit(value[key], depth + 1)
        elif isinstance(value, list):
            value[:] = [visit(item, depth + 1) for item in value]
        elif isinstance(value, tuple):
            result = tuple([visit(item, depth + 1) for item in value])
        done[id(value)] = value, result
        return result

    return visit(tree, 0)


_OPEN = object()
