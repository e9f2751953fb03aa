# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Weights: reading, converting, downloading, loading and saving them.

    names                           the table of names: MMDetection's and torchvision's <-> Detectron2's
    mmdet, torchvision              state dicts -> state dicts with Detectron2's names, and back
    provenance                      who made a file, and its conversion
    files                           digests, and writing in one step
    reader, formats, unpickler,     reading of files as data, without running anything that is in them
    vocabulary, stand_ins
    weights                         a file of any kind -> checked weights
    download, path_handlers         values of MODEL.WEIGHTS -> local files
    class_names                     how the classes of a file of weights are called
    checkpointer, fit, resuming     local files -> a model, and back
    __main__                        `python -m dcn_d2.checkpoint`, which converts a file by hand

The names below are imported when they are first used, so that renaming needs neither torch nor Detectron2.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpointer import DCNCheckpointer, UntrainedError
    from .files import CorruptCheckpointError
    from .mmdet import convert_mmdet_state_dict, to_mmdet
    from .path_handlers import register_path_handlers
    from .reader import read_checkpoint
    from .torchvision import convert_torchvision_resnet, is_torchvision_resnet
    from .weights import read_weights

_HOMES = {
    "DCNCheckpointer": "checkpointer",
    "UntrainedError": "checkpointer",
    "convert_mmdet_state_dict": "mmdet",
    "to_mmdet": "mmdet",
    "register_path_handlers": "path_handlers",
    "CorruptCheckpointError": "files",
    "read_checkpoint": "reader",
    "read_weights": "weights",
    "convert_torchvision_resnet": "torchvision",
    "is_torchvision_resnet": "torchvision",
}

__all__ = [
    "CorruptCheckpointError",
    "DCNCheckpointer",
    "UntrainedError",
    "convert_mmdet_state_dict",
    "convert_torchvision_resnet",
    "is_torchvision_resnet",
    "read_checkpoint",
    "read_weights",
    "register_path_handlers",
    "to_mmdet",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
