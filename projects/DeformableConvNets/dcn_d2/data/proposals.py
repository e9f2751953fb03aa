# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Files of precomputed proposals (MODEL.LOAD_PROPOSALS).

They are pickles, which could run code, and Detectron2 loads them without a check. So they are read here first, by a
reader that knows only arrays and numbers.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

# What an array, a number, a BoxMode and text of Python 2 are made with. numpy 2 calls its core numpy._core.
_ALLOWED = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("detectron2.structures.boxes", "BoxMode"),
}
# The names in Detectron2's files, and in those of Detectron1.
_KEYS = (("ids", "indexes"), ("boxes",), ("objectness_logits", "scores"))


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"it names {module}.{name}, which is not data: reading it could run code")
        return super().find_class(module, name)


def check_proposals(cfg: CfgNode, split: str) -> None:
    """Checks the files of proposals of a config before anything else opens them.

    Args:
        cfg: with MODEL.LOAD_PROPOSALS.
        split: "TRAIN" or "TEST".

    Raises:
        ValueError: One is not a file of proposals, or could run code.
        FileNotFoundError: One is not there.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    key = f"DATASETS.PROPOSAL_FILES_{split}"
    sets, files = cfg.DATASETS[split], cfg.DATASETS[f"PROPOSAL_FILES_{split}"]
    if len(files) != len(sets):
        raise ValueError(
            f"{key} names {len(files)} files, but DATASETS.{split} {len(sets)} data sets: MODEL.LOAD_PROPOSALS needs "
            "one for each"
        )
    for path in files:
        if not PathManager.exists(path):
            raise FileNotFoundError(f"{key}: there is no file {path}")
        _check_file(path, key)


def _check_file(path: str, key: str) -> None:
    try:
        with PathManager.open(path, "rb") as file:
            proposals = _DataUnpickler(file, encoding="latin1").load()
    except Exception as error:  # damaged pickles raise errors of a dozen types
        raise ValueError(f"{key}: {path} is refused: {error or type(error).__name__}") from error
    if not isinstance(proposals, dict):
        raise ValueError(f"{key}: {path} holds a {type(proposals).__name__}, not a dict with ids and boxes")
    lengths = {}
    for names in _KEYS:
        found = next((name for name in names if name in proposals), None)
        if found is None or not isinstance(proposals[found], (Sequence, np.ndarray)):
            raise ValueError(f"{key}: {path} has no list {' or '.join(map(repr, names))}")
        lengths[found] = len(proposals[found])
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{key}: {path} has lists of different lengths: {lengths}")
