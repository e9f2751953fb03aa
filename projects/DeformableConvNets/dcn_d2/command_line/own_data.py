# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The arguments of train_net.py for data of the user's own."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable

SET_BY_DATA = ("DATASETS.OWN", "DATASETS.CLASS_NAMES")


def add_own_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --train-json, --train-images, --test-json, --test-images, --split, --epochs and --from-published."""
    group = parser.add_argument_group(
        "your own data", "in COCO's format. Each may be given several times: the n-th folder belongs to the n-th file"
    )
    for part, verb in (("train", "train on"), ("test", "evaluate on")):
        group.add_argument(
            f"--{part}-json",
            action="append",
            default=[],
            metavar="FILE",
            help=f"annotations to {verb}" + ("; names and number of classes come from here" if part == "train" else ""),
        )
        group.add_argument(
            f"--{part}-images",
            action="append",
            default=[],
            metavar="FOLDER",
            help=f"the images of --{part}-json; one folder may serve all files",
        )
    group.add_argument(
        "--split",
        type=float,
        metavar="PART",
        help="instead of --test-json: train on this part of the images, for example 0.8, and evaluate on the rest",
    )
    group.add_argument(
        "--epochs",
        type=float,
        metavar="N",
        help="train until each image was seen N times; the schedule keeps its proportions",
    )
    group.add_argument(
        "--from-published",
        action="store_true",
        help="start from the published weights of the row (PUBLISHED.WEIGHTS) instead of ImageNet's",
    )


def check_own_data_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message if the arguments cannot work, and makes paths absolute.

    Args:
        parser: for the message.
        args: what it has parsed, with --published already counted as --eval-only.
    """
    for part in ("train", "test"):
        files, folders = getattr(args, f"{part}_json"), getattr(args, f"{part}_images")
        if files and not folders:
            parser.error(f"--{part}-json needs --{part}-images FOLDER, the folder of its images")
        if folders and not files:
            parser.error(f"--{part}-images needs --{part}-json FILE, the annotations of the images")
        if len(folders) not in (1, len(files)) and files:
            parser.error(
                f"--{part}-images: {len(folders)} folders for {len(files)} files of --{part}-json: give one for each "
                "file, or one for all"
            )
        setattr(args, f"{part}_json", [_find(parser, f"--{part}-json", name, os.path.isfile) for name in files])
        setattr(args, f"{part}_images", [_find(parser, f"--{part}-images", name, os.path.isdir) for name in folders])
    _check_split_and_epochs(parser, args)
    if args.published and (args.train_json or args.test_json):
        parser.error(
            "--published evaluates on COCO: for other data, --eval-only --test-json and MODEL.WEIGHTS mmdet://…"
        )
    if args.from_published and (args.eval_only or "MODEL.WEIGHTS" in args.opts):
        parser.error(
            "--from-published chooses the weights that training starts from: leave out --eval-only and MODEL.WEIGHTS"
        )
    keys = args.opts[::2]
    chosen = [*SET_BY_DATA, "DATASETS.TEST"] * bool(args.train_json or args.test_json)
    for key in ("DATASETS.TRAIN", *chosen) if args.train_json else chosen:
        if key in keys:
            parser.error(f"{key} follows from {'--train-json' if args.train_json else '--test-json'}: leave it out")


def _check_split_and_epochs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.split is not None:
        if not 0 < args.split < 1:
            parser.error(f"--split must be above 0 and below 1, got {args.split:g}")
        if len(args.train_json) != 1 or args.test_json:
            parser.error("--split divides one file: it needs one --train-json and no --test-json")
    if args.epochs is not None:
        if not (args.epochs > 0 and math.isfinite(args.epochs)):
            parser.error(f"--epochs must be a number above 0, got {args.epochs:g}")
        if not args.train_json:
            parser.error("--epochs counts the images of --train-json: without it, set SOLVER.MAX_ITER")
        if "SOLVER.MAX_ITER" in args.opts[::2]:
            parser.error("--epochs sets SOLVER.MAX_ITER: leave one of them out")


def _find(parser: argparse.ArgumentParser, argument: str, name: str, exists: Callable[[str], bool]) -> str:
    """Gives the absolute path of a file or folder, "~" replaced."""
    path = os.path.abspath(os.path.expanduser(name))
    if not exists(path):
        kind, other = ("file", os.path.isdir(path)) if exists is os.path.isfile else ("folder", os.path.isfile(path))
        found = f"; it is a {'folder' if kind == 'file' else 'file'}" if other else ""
        parser.error(f"{argument}: there is no {kind} {path}{found}")
    return path
