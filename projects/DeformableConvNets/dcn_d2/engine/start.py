# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What a process of a job sets up before it trains or evaluates."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..config import load_config
from ..data.own import register_own_data
from . import folder
from .machine import fit_to_machine, scale_learning_rate

logger = logging.getLogger(__name__)


def setup(args: Namespace, cfg: CfgNode | None = None) -> CfgNode:
    """Fits a config to this machine, and sets up loggers and seeds.

    For training, the main process locks OUTPUT_DIR for this job. An evaluation does not change the config.yaml that
    the training has left in OUTPUT_DIR.

    Args:
        args: the command line; config_file, opts, eval_only and notes, lines for the log, are read, and Detectron2 logs
            all of it.
        cfg: the config, if it has been read already; it is not changed.

    Returns:
        The config that runs, frozen.
    """
    cfg = load_config(args.config_file, args.opts) if cfg is None else cfg.clone()
    register_own_data(cfg)
    evaluates = getattr(args, "eval_only", False)
    if comm.is_main_process() and not evaluates:
        folder.lock_folder(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="dcn_d2")
    fit_to_machine(cfg, processes=comm.get_local_size())
    scale_learning_rate(cfg)
    cfg.freeze()
    saved = Path(cfg.OUTPUT_DIR) / "config.yaml"
    kept = saved.read_bytes() if evaluates and comm.is_main_process() and saved.is_file() else None
    default_setup(cfg, args)
    if kept is not None:
        saved.write_bytes(kept)
    for note in getattr(args, "notes", ()):
        logger.info(note)
    return cfg
