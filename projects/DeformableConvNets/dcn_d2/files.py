# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Writes files in one step, whole or not at all, and says which paths are files."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def is_local(folder: str) -> bool:
    """Whether `folder` is on a file system, and not another address (s3://…)."""
    return bool(folder) and "://" not in folder


class _Part(io.FileIO):
    """A file that remembers why it could not be written. The error that torch.save raises then does not tell."""

    error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.error = error
            raise


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a file for writing. It gets its name when it is complete, so that no one ever sees a part of it.

    Raises:
        OSError: It could not be written, for example because the disk is full. A file that had its name is untouched.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(prefix=f".{target.name[-200:]}.", suffix=".part", dir=target.parent)
    raw = _Part(descriptor, "wb")
    lock(raw)  # says that it is in use, see checkpoint.files.remove_leftovers
    try:
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            os.fsync(descriptor)
            os.chmod(part, 0o666 & ~_umask())  # mkstemp lets only the owner read
            os.replace(part, target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        reason = raw.error or error
        if isinstance(reason, OSError) and reason.errno:
            message = f"{target} could not be written: {os.strerror(reason.errno)}"
            raise OSError(reason.errno, f"{message}; a file that had this name before is untouched") from error
        raise


def lock(file: IO[bytes] | io.FileIO) -> bool:
    """Locks an open file until it is closed, without waiting. Returns False if another process has locked it."""
    try:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # another system, another process, or a file system without locks
        return False
    return True


def _umask() -> int:
    """The process's mask for the permissions of new files. It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
