# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What ``train_net.py --check-data`` runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from detectron2.config import CfgNode

from .inspector import Pair, check_config_data, check_files
from .pixels import HowToRead

FOLDER = "data-check"


def run_check_data(args: argparse.Namespace, cfg: CfgNode) -> int:
    """Inspects data sets, prints the report and writes it into OUTPUT_DIR/data-check.

    Files that the command line names with --train-json and --test-json are taken as they are; else the data sets are
    those of the config.

    Args:
        args: the command line.
        cfg: the config.

    Returns:
        The exit code: 1 if there are errors, else 0.

    Raises:
        ValueError: There is no data set.
    """
    how = HowToRead.of(args.quick, args.check_workers, args.check_processes, progress=True)
    folder = Path(cfg.OUTPUT_DIR) / FOLDER
    train, test = (_pairs(args, part) for part in ("train", "test"))
    if train or test:
        model = cfg if args.config_file or args.opts else None
        report = check_files(train, test, model, how, folder, classes_from_data=bool(train))
    elif cfg.DATASETS.TRAIN or cfg.DATASETS.TEST:
        report = check_config_data(cfg, how, folder)
    else:
        raise ValueError("--check-data: DATASETS.TRAIN and DATASETS.TEST name no data set (is --config-file missing?)")
    print(report)
    print(f"written to {folder}")
    return 0 if report.ok else 1


def _pairs(args: argparse.Namespace, part: str) -> list[Pair]:
    """The files of --train-json or --test-json and their folders; one folder may serve all files."""
    files, folders = getattr(args, f"{part}_json", None) or [], getattr(args, f"{part}_images", None) or []
    return list(zip(files, folders * len(files) if len(folders) == 1 else folders))
