# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What ``train_net.py --check-data`` runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from detectron2.config import CfgNode

from .check import check_config_data

FOLDER = "data-check"


def run_check_data(args: argparse.Namespace, cfg: CfgNode) -> int:
    """Inspects the data sets of a config, prints the report and writes it into OUTPUT_DIR/data-check.

    Args:
        args: with the arguments of `dcn_d2.command_line.check_data`.
        cfg: with DATASETS.

    Returns:
        The exit code: 1 if there are errors, else 0.

    Raises:
        ValueError: The config names no data set.
    """
    if not (cfg.DATASETS.TRAIN or cfg.DATASETS.TEST):
        raise ValueError("--check-data: DATASETS.TRAIN and DATASETS.TEST name no data set")
    folder = Path(cfg.OUTPUT_DIR) / FOLDER
    report = check_config_data(
        cfg,
        quick=args.quick,
        workers=args.check_workers,
        processes=args.check_processes,
        progress=True,
        output=folder,
    )
    print(report)
    print(f"written to {folder}")
    return 0 if report.ok else 1
