# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The config with which an exported file is run and evaluated."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from ..checkpoint.class_names import check_class_names
from ..command_line.exported import find_fixed_key
from ..config import ConfigError, load_config
from ..config.access import value_of
from .description import Description
from .model import open_model


def config_of(
    description: Description, path: str | os.PathLike[str], opts: Sequence[Any] = (), config_file: str = ""
) -> CfgNode:
    """Gives the config that lies in an exported file, fitted to what the file can do.

    MODEL.WEIGHTS is the file, and INPUT.CANVAS_TEST its size if that is fixed. What the graph has fixed stays as it is.

    Args:
        description: of the file.
        path: of the file.
        opts: KEY VALUE pairs that override the config.
        config_file: a config to take instead; what the graph has fixed comes from the file all the same.

    Raises:
        ConfigError: a value cannot work, or would change what the graph has fixed.
        ValueError: the model of `config_file` has other classes, masks or channels.
    """
    if key := find_fixed_key(opts):
        raise ConfigError(f"{key} is fixed in the exported model {os.fspath(path)}: export it again to change it")
    own = _read(description, path, () if config_file else opts, check=not config_file)
    cfg = load_config(config_file, opts) if config_file else own
    if config_file:
        _check_fits(cfg, own, description, config_file, path)
        cfg.MODEL = own.MODEL
        cfg.INPUT.FORMAT, cfg.TEST.DETECTIONS_PER_IMAGE = own.INPUT.FORMAT, own.TEST.DETECTIONS_PER_IMAGE
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = os.fspath(path), "cpu"
    cfg.MODEL.MASK_ON = gives_masks(description)
    cfg.INPUT.CANVAS_TEST = description.size or ()
    if cfg.TEST.AUG.ENABLED:
        raise ConfigError("TEST.AUG.ENABLED is True, but an exported model sees each image once: set it to False")
    check_class_names(cfg.DATASETS.CLASS_NAMES, description.class_names, os.fspath(path), resume=False)
    if description.class_names and not (cfg.DATASETS.CLASS_NAMES or cfg.DATASETS.OWN):
        cfg.DATASETS.CLASS_NAMES = list(description.class_names)
    return cfg


def read_exported(args: Namespace, processes: int = 1) -> CfgNode:
    """Opens the exported model of a command line, as `args.exported`, and gives the config with which it runs.

    Args:
        args: model, opts and config_file of the command line.
        processes: that share the threads of this machine.
    """
    args.exported = open_model(args.model, max(1, torch.get_num_threads() // processes) if processes > 1 else 0)
    return config_of(args.exported.description, args.model, args.opts, args.config_file or "")


def gives_masks(description: Description) -> bool:
    """Whether an exported detector gives masks."""
    return any(output.name == "masks" for output in description.outputs)


def _read(description: Description, path: str | os.PathLike[str], opts: Sequence[Any], check: bool) -> CfgNode:
    """Reads the text of the config as a file is read: as data. With `check` its data sets are registered."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"config in {Path(path).name}")
        file.write_text(description.config)
        return load_config(str(file), opts, check)


def _check_fits(
    cfg: CfgNode, own: CfgNode, description: Description, config_file: str, path: str | os.PathLike[str]
) -> None:
    """Refuses a config of another kind of model."""
    for key in ("MODEL.META_ARCHITECTURE", "MODEL.ROI_HEADS.NUM_CLASSES", "INPUT.FORMAT"):
        if (given := value_of(cfg, key)) != (fixed := value_of(own, key)):
            raise ValueError(
                f"{key} is {given} in --config-file {config_file}, and {fixed} in --model {os.fspath(path)}: take the "
                "config of the exported model, or leave --config-file out"
            )
    if cfg.MODEL.MASK_ON and not gives_masks(description):
        raise ValueError(
            f"MODEL.MASK_ON is True in --config-file {config_file}, but --model {os.fspath(path)} gives no masks: "
            "export it with masks, or leave --config-file out"
        )
