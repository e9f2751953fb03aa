# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Reading of weights: renaming as pure functions over dictionaries, and what applies it to files and models.

The names below are imported when they are first used, so that the renaming needs neither torch nor Detectron2.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpointer import DCNCheckpointer
    from .files import CorruptCheckpointError
    from .mmdet import convert_mmdet_state_dict, to_mmdet
    from .path_handlers import register_path_handlers
    from .reader import read_checkpoint
    from .torchvision import convert_torchvision_resnet, is_torchvision_resnet
    from .weights import read_weights

_HOMES = {
    "DCNCheckpointer": "checkpointer",
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
