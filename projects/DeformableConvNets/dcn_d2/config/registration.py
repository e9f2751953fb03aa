# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What makes Detectron2 know dcn_d2."""

from __future__ import annotations

from detectron2.config import CfgNode

from .keys import add_dcn_keys


def register() -> None:
    """Registers everything of dcn_d2 with Detectron2; a second call changes nothing.

    - Backbones, proposal generator, RoI heads and poolers: configs may name them.
    - The data sets `nuclei_train` and `nuclei_val`.
    - The addresses of foreign weights, `mmdet://...` and others, that MODEL.WEIGHTS may be.
    - The deformable convolutions of dcn_d2 take the place of Detectron2's in Detectron2's own deformable ResNet block,
      so that its deformable models also run on CPU.

    A process that gets a finished config, for example by pickle, calls this and not `add_dcn_config`.
    """
    from .. import checkpoint, data, modeling  # noqa: F401  the last two register what they have when imported

    modeling.use_dcn_layers_in_detectron2()
    checkpoint.register_path_handlers()


def add_dcn_config(cfg: CfgNode) -> None:
    """Adds dcn_d2's keys to `cfg`, and registers everything of dcn_d2 with Detectron2: it calls `register`.

    Keys that `cfg` has already keep their values, so a second call changes nothing. To read a file into `cfg`, call
    `cfg.merge_from_file(file, allow_unsafe=False)`: without the second argument, Detectron2 runs code that the file
    asks for. `load_config` does all of this.
    """
    register()
    add_dcn_keys(cfg)


def register_own_data(cfg: CfgNode) -> None:
    """Registers the data sets of DATASETS.OWN; see `dcn_d2.data.own.register_own_data`."""
    from ..data import own

    own.register_own_data(cfg)
