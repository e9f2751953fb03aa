# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Reads the three formats of checkpoints: PyTorch's two, and the pickles of Detectron2's zoo.

The first bytes of a file tell its format. No file is read with `pickle.load` or `torch.load`; see `unpickler`.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from typing import IO, Any

import torch

from .stand_ins import DamagedError, Storage, StorageType
from .unpickler import BoundedFile, DataUnpickler, finish

MAX_PICKLE = 64 << 20  # bytes of the part without values, which in a training checkpoint has less than one MiB
MAX_DIRECTORY = 16 << 20  # bytes of a zip archive's list of members

_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")  # PyTorch's number 0x1950a86a20f9469cfc6c, pickled
_OTHERS = {  # first bytes of files that people mistake for checkpoints
    b"<": "a web page",
    b"version https://git-lfs": "a pointer of Git LFS, whose content `git lfs pull` fetches",
    b"\x1f\x8b": "a gzip archive, which has to be unpacked first",
    b"\xfd7zXZ": "an xz archive, which has to be unpacked first",
}


def read_file(file: IO[bytes], values: bool = True) -> Any:
    """Reads the data of a checkpoint, onto the CPU.

    Args:
        file: the open file.
        values: without them, the tensors of PyTorch's formats are on the device "meta".

    Raises:
        NotDataError: It names something that is not data.
        DamagedError: It contradicts itself. Damaged files raise errors of many other types, too.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(512)
    file.seek(0)
    if not start:
        raise DamagedError("it is empty")
    for beginning, what in _OTHERS.items():
        if start.lstrip().startswith(beginning):
            raise DamagedError(f"it is {what}")
    if start[257:262] == b"ustar":
        raise DamagedError("it is in the tar format of PyTorch before 0.2; load and save it with a later one")
    if start.startswith(b"PK\x03\x04"):
        return finish(_read_zip(file, size, values))
    if _LEGACY_MAGIC in start[:32]:
        return finish(_read_legacy(BoundedFile(file, size), values))
    return finish(DataUnpickler(BoundedFile(file, size), payload=size).load())


def _read_zip(file: IO[bytes], size: int, with_values: bool) -> Any:
    _check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        members: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            name = info.filename.partition("/")[2]
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise DamagedError(f"its part {name} is compressed, which PyTorch never does")
            if name in members:
                raise DamagedError(f"it holds {name} twice")
            members[name] = info
        if sum(info.file_size for info in members.values()) > size:
            raise DamagedError("its parts claim to be larger than the file")
        if "data.pkl" not in members:
            raise DamagedError("it is a zip archive without data.pkl")
        if "constants.pkl" in members:
            raise DamagedError("it is a TorchScript model; save the model's state_dict() instead")
        if members["data.pkl"].file_size > MAX_PICKLE:
            raise DamagedError(f"its data.pkl has more than {MAX_PICKLE} bytes")
        if "byteorder" in members and archive.read(members.pop("byteorder")) != b"little":
            raise DamagedError("its numbers are big-endian; save it again on a little-endian machine")
        storages: dict[str, Storage] = {}

        def load(pid: tuple) -> Storage:
            _, kind, key, _, count = pid[:5]
            if not isinstance(kind, StorageType) or not isinstance(key, str) or f"data/{key}" not in members:
                raise DamagedError(f"the values of {key!r} are missing")
            if key not in storages:
                info = members[f"data/{key}"]
                if info.file_size != kind.size_of(count):
                    raise DamagedError(
                        f"its part {info.filename} has {info.file_size} bytes instead of {kind.size_of(count)}"
                    )
                values = torch.empty(count, dtype=kind.dtype, device="cpu" if with_values else "meta")
                if with_values:
                    with archive.open(info) as member:
                        BoundedFile(member, size).fill(values)
                        member.read(1)  # at the end zipfile compares the checksum, which torch.load does not
                storages[key] = Storage(values, kind.quantised)
            elif storages[key].values.dtype != kind.dtype:  # the same bytes as another type
                return Storage(storages[key].values.view(torch.uint8).view(kind.dtype), kind.quantised)
            return storages[key]

        pickled = io.BytesIO(archive.read(members["data.pkl"]))
        tree = DataUnpickler(BoundedFile(pickled, members["data.pkl"].file_size), load, size).load()
        for name, info in members.items():  # checksums of the rest
            if with_values and name != "data.pkl" and name.removeprefix("data/") not in storages:
                archive.read(info)
        return tree


def _check_directory(file: IO[bytes], size: int) -> None:
    """Refuses an archive whose list of members is so long that `zipfile` would take much memory for it."""
    file.seek(max(0, size - (1 << 16) - 100))
    tail = file.read()
    file.seek(0)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        raise DamagedError("the end of the zip archive is missing")
    (length,) = struct.unpack_from("<L", tail, end + 12)
    long_end = tail.rfind(b"PK\x06\x06", 0, end)
    if long_end >= 0 and len(tail) >= long_end + 48:
        length = max(0 if length == 0xFFFFFFFF else length, *struct.unpack_from("<Q", tail, long_end + 40))
    if length > MAX_DIRECTORY:
        raise DamagedError(f"its list of members claims {length} bytes")


def _read_legacy(file: BoundedFile, with_values: bool) -> Any:
    """Reads the format of PyTorch before 1.6: five pickles, and then the values of all storages."""
    DataUnpickler(file).load()
    protocol, system = DataUnpickler(file).load(), DataUnpickler(file).load()
    if protocol != 1001 or not isinstance(system, dict):
        raise DamagedError(f"its protocol is {protocol!r} instead of 1001")
    if not system.get("little_endian", True):
        raise DamagedError("its numbers are big-endian; save it again on a little-endian machine")
    storages: dict[str, Storage] = {}
    claimed = 0

    def load(pid: tuple) -> Storage:
        nonlocal claimed
        _, kind, key, _, count = pid[:5]
        view = pid[5] if len(pid) > 5 else None
        if not isinstance(kind, StorageType) or not isinstance(key, str):
            raise DamagedError("it refers to values of an unknown type")
        if key not in storages:
            claimed += kind.size_of(count)
            if claimed > file.size:
                raise DamagedError("its tensors claim to be larger than the file")
            values = torch.zeros(count, dtype=kind.dtype, device="cpu" if with_values else "meta")
            storages[key] = Storage(values, kind.quantised)
        whole = storages[key]
        if whole.values.dtype != kind.dtype or whole.values.numel() != count:
            raise DamagedError(f"the values of {key!r} are described in two ways")
        if view is None:
            return whole
        _, offset, length = view
        if type(offset) is not int or type(length) is not int or not 0 <= offset <= offset + length <= count:
            raise DamagedError("a part of a storage reaches beyond its end")
        return Storage(whole.values[offset : offset + length], kind.quantised)

    tree = DataUnpickler(file, load, file.size).load()
    keys = DataUnpickler(file).load()
    if not isinstance(keys, list) or len(keys) != len(storages) or set(map(str, keys)) != storages.keys():
        raise DamagedError("its list of storages is not that of its tensors")
    for key in keys if with_values else ():
        values = storages[key].values
        if file.read(8) != struct.pack("<q", values.numel()):
            raise DamagedError(f"the values of {key!r} are not as many as its tensors say")
        file.fill(values)
    return tree
