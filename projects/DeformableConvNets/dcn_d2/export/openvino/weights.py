# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The file of weights beside OpenVINO's graph."""

from __future__ import annotations

import hashlib
from pathlib import Path

# Under this name the graph holds the SHA-256 of its weights' file.
KEY_OF_WEIGHTS = "dcn_d2_bin"


def weights_of(path: Path) -> Path:
    """Where the weights of a graph are."""
    return path.with_suffix(".bin")


def digest_of(path: Path) -> str:
    """Gives the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
