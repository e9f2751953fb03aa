# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Files of weights: reading them as data and never as code, their digests, and writing them in one step."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch


class CorruptCheckpointError(ValueError):
    """A file that is no checkpoint, or only a part of one."""


class _Ignored:
    """Stands in for an object of a training run that is left in a checkpoint; holds nothing and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What pickles of NumPy's arrays and numbers name.
_ARRAYS = [
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    *("numpy.ndarray", "numpy.dtype", "_codecs.encode"),
]
# MMDetection 3.x leaves the history of the losses in its training checkpoints. None of these classes and functions is
# imported or called, the stand-in takes their place.
_LEFT_BY_TRAINING = ["mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr", *_ARRAYS]


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint of PyTorch, old or new format, onto the CPU: tensors, containers, text and numbers only.

    Raises:
        CorruptCheckpointError: The file is truncated, corrupted, or no checkpoint.
        ValueError: It holds objects of other types, which could run code when they are read.
        OSError: It cannot be opened.
    """
    stand_ins: list[Any] = [(_Ignored, name) for name in _LEFT_BY_TRAINING]
    with open(path, "rb") as file, torch.serialization.safe_globals(stand_ins):
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files make torch.load raise errors of a dozen types, OSError too
            raise _explain(path, error) from error
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        what = "nothing" if isinstance(checkpoint, Mapping) else f"a {type(checkpoint).__name__}"
        raise CorruptCheckpointError(f"{path} is no checkpoint: it holds {what} instead of named weights")
    left_over = {key for key, value in checkpoint.items() if _holds_stand_in(value)}
    if left_over and ("state_dict" in left_over or "state_dict" not in checkpoint):
        raise ValueError(
            f"{path} is refused: below {', '.join(map(repr, sorted(left_over)))} it holds objects of NumPy or MMEngine "
            "and not only tensors, text and numbers"
        )
    return {key: value for key, value in checkpoint.items() if key not in left_over}


def check_pickle(path: str | os.PathLike[str]) -> None:
    """Checks that a pickle, as Detectron2's zoo has them, holds arrays, containers, text and numbers only.

    Raises:
        CorruptCheckpointError: The file is truncated, corrupted, or no pickle.
        ValueError: It holds objects of other types, which could run code when they are read.
        OSError: It cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            _Scanner(file, encoding="latin1").load()  # Detectron2 reads the text of Python 2 in this encoding
        except _RefusedError as refused:
            raise ValueError(_refusal(path, str(refused), "detectron2.checkpoint.DetectionCheckpointer")) from None
        except Exception as error:  # damaged files make pickle raise errors of many types
            raise CorruptCheckpointError(_damage(path, "pickle of weights", error)) from error


class _RefusedError(Exception):
    pass


class _Scanner(pickle.Unpickler):
    """Goes through a pickle without importing or calling anything that it names."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if f"{module}.{name}" in _ARRAYS:
            return _Ignored
        raise _RefusedError(f"{module}.{name}")


def _refusal(path: str | os.PathLike[str], what: str, reader: str) -> str:
    return (
        f"{path} is refused: it holds more than weights, namely {what}, and reading that could run code of whoever "
        f"wrote the file. If you trust its origin, read it with {reader} yourself and save its state dict alone"
    )


def _damage(path: str | os.PathLike[str], what: str, error: Exception) -> str:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return f"{path} ({os.path.getsize(path)} bytes) is truncated, corrupted, or no {what}: {reason[-1]}"


def _explain(path: str | os.PathLike[str], error: Exception) -> ValueError:
    """What an error of torch.load says about the file."""
    message = str(error)
    found = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", message)
    with open(path, "rb") as file:
        is_pickle = file.read(1) == b"\x80" and "Unsupported operand" in message
    if found or is_pickle:
        what = found[1] if found else "Python objects"
        return ValueError(_refusal(path, what, "torch.load(..., weights_only=False)"))
    return CorruptCheckpointError(_damage(path, "checkpoint of PyTorch", error))


def _holds_stand_in(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_stand_in, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_stand_in, value))
    return isinstance(value, _Ignored)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_in_name(name: str) -> str | None:
    """The first 8 digits of the SHA-256 digest, which publishers put at the end of a file's name; None without them.

    For example "d68aed1e" of "faster_rcnn_r50_fpn_dconv_c3-c5_1x_coco_20200130-d68aed1e.pth". A date is no digest.
    """
    found = re.search(r"-([0-9a-f]{8})\.(?:pth|pt|bin)$", name)
    return found[1] if found and not re.fullmatch(r"20[0-3]\d[01]\d[0-3]\d", found[1]) else None


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a file for writing that takes its name when it is complete, so that nobody ever sees a part of it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o666 & ~_umask())  # mkstemp lets only the owner read
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise


def _umask() -> int:
    """The process's mask for new files, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
