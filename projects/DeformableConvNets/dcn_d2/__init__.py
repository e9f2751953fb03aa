# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable ConvNets for Detectron2. Importing this package imports neither torch nor Detectron2."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode

__version__ = "0.1.0"
__all__ = ["add_dcn_config"]


def add_dcn_config(cfg: CfgNode) -> None:
    """Adds dcn_d2's keys to a Detectron2 config, and registers everything of dcn_d2 with Detectron2.

    `dcn_d2.config.keys` has a sentence about each key. `dcn_d2.config.register` says what is registered.
    """
    from .config import add_dcn_config as add

    add(cfg)
