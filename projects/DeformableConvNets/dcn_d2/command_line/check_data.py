# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The arguments of train_net.py that ask for an inspection of the data."""

from __future__ import annotations

import argparse


def add_check_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --check-data and how it reads images."""
    group = parser.add_argument_group("check data")
    group.add_argument(
        "--check-data",
        action="store_true",
        help="read the data sets whole, say what is wrong with them, and stop: exit code 1 if there are errors. "
        "The report and pictures of samples go to OUTPUT_DIR/data-check",
    )
    group.add_argument("--quick", action="store_true", help="with --check-data: read only the headers of images")
    group.add_argument(
        "--check-workers", type=int, metavar="N", help="with --check-data: images read at a time (number of cores)"
    )
    group.add_argument(
        "--check-processes", action="store_true", help="with --check-data: read images by processes, not by threads"
    )


def check_check_data_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what does not go together."""
    if not args.check_data:
        given = [
            name for name in ("quick", "check_workers", "check_processes") if getattr(args, name) not in (None, False)
        ]
        if given:
            parser.error(f"--{given[0].replace('_', '-')} goes with --check-data")
        return
    others = ("eval_only", "published", "resume", "overwrite")
    if other := next((name for name in others if getattr(args, name)), None):
        parser.error(f"--check-data trains and evaluates nothing: leave out --{other.replace('_', '-')}")
    if args.check_workers is not None and args.check_workers < 1:
        parser.error(f"--check-workers must be at least 1, got {args.check_workers}")
