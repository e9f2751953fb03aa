# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Files of weights: their digests, and what killed processes left of them. Needs neither torch nor Detectron2."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from pathlib import Path

from ..files import lock


class CorruptCheckpointError(ValueError):
    """A file that is not a checkpoint, or only a part of one."""


def check_digest(path: str | os.PathLike[str]) -> None:
    """Compares a file with the digest in its name, if there is one.

    Raises:
        CorruptCheckpointError: They differ.
    """
    expected = digest_in_name(os.path.basename(path))
    if expected is not None and not (digest := sha256_of(path)).startswith(expected):
        raise CorruptCheckpointError(
            f"{path}: its SHA-256 digest begins with {digest[:8]}, but with {expected} according to its name. It is "
            "truncated or corrupted; if it is another file on purpose, rename it"
        )


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_in_name(name: str) -> str | None:
    """The digest in a file's name: the first 8 digits of SHA-256, which publishers put at its end. None if it has none.

    For example "d68aed1e" of "faster_rcnn_r50_fpn_dconv_c3-c5_1x_coco_20200130-d68aed1e.pth". A date is not a digest.
    """
    found = re.search(r"-([0-9a-f]{8})\.(?:pth|pt|bin)$", name)
    return found[1] if found and not re.fullmatch(r"20[0-3]\d[01]\d[0-3]\d", found[1]) else None


def remove_leftovers(folder: str | os.PathLike[str], min_age: float = 60) -> list[str]:
    """Removes what `write_atomically` left in a folder when its process was killed.

    Files that a process is still writing are locked by it, and stay, as do those younger than `min_age` seconds.

    Returns:
        The names of the removed files.
    """
    removed = []
    for path in sorted(Path(folder).glob(".*.part")) if os.path.isdir(folder) else []:
        if not re.fullmatch(r"\..+\.(pth|json)\.[a-z0-9_]{8}\.part|\.last_checkpoint\.[a-z0-9_]{8}\.part", path.name):
            continue
        with contextlib.suppress(FileNotFoundError, PermissionError):  # another process removes it, or it is not ours
            if path.is_symlink() or time.time() - path.stat().st_mtime < min_age:
                continue
            with path.open("rb") as file:
                if lock(file):
                    path.unlink()
                    removed.append(path.name)
    return removed
