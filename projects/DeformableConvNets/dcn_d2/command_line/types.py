# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What arguments of several scripts have in common: the types of numbers, and the arguments that name images."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable

from .exported import add_exported_argument, check_exported

IMAGE_SOURCES = """
what --input takes, in any mixture:
  a.jpg "my image.png"         image files
  photos                       a folder: all images and videos below it
  'photos/**/*.jpg'            a pattern in quotes, for more files than a command line can hold; ** goes into folders
  list.txt                     a text file with one path a line; relative ones start at the file's folder
  list.csv list.jsonl          tables with a column file_name, filename, path, image or file
  annotations.json             a file in COCO's format, alone; --images has its images. Their ids are kept.
  film.mp4                     a video: --frames 5 takes every fifth frame
  -                            paths from standard input, one a line
  https://host/a.jpg s3://...  addresses that Detectron2's PathManager has a handler for
"""

_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+")  # of a config


def count(least: int) -> Callable[[str], int]:
    """Makes the type of an argument that is a whole number of at least `least`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    parse.__name__ = "whole number"  # argparse's message has this word if the text is not a number
    return parse


def score(text: str) -> float:
    """The type of an argument that is a score: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:  # nan is refused too
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return value


def shard(text: str) -> tuple[int, int]:
    """The type of an argument i/n: the i-th of n shards, from 1/n to n/n."""
    number, slash, total = text.partition("/")
    if not (slash and number.isdecimal() and total.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be written as 2/4, the second of four shards, got {text}")
    if not 1 <= int(number) <= int(total):
        raise argparse.ArgumentTypeError(f"shards count from 1, so those of {total} are 1/{total} to {total}/{total}")
    return int(number), int(total)


def add_model_arguments(parser: argparse.ArgumentParser, exported: bool = False) -> None:
    """Adds the arguments that choose the model, which may be an `exported` one."""
    text = "a YAML, or the name of a zoo's row"
    parser.add_argument("--config-file", required=not exported, metavar="FILE", help=text)
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--weights", metavar="FILE", help="checkpoint; MODEL.WEIGHTS of the config by default")
    weights.add_argument("--published", action="store_true", help="take the published weights of a row of the zoo")
    if exported:
        add_exported_argument(parser, "an exported model, in place of --config-file and --weights")


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what goes with --input."""
    parser.add_argument("--images", metavar="FOLDER", help="where relative paths in lists and COCO files start")
    parser.add_argument("--frames", type=count(1), default=1, metavar="N", help="take every N-th frame of a video")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the config")


def check_pairs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Moves KEY VALUE pairs behind --input to the others; refuses options behind them, and keys without a value."""
    words = args.input or []
    keys = [i for i, word in enumerate(words) if _KEY.fullmatch(word) and not os.path.lexists(word)]
    if keys:
        args.input, args.opts = words[: keys[0]], words[keys[0] :] + args.opts
    check_opts(parser, args.opts)


def check_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message if the arguments name no model, or more than one."""
    check_exported(parser, args, "config_file", "weights", "published")
    if not (args.config_file or args.model):
        parser.error("--config-file FILE or --model FILE is needed")


def check_opts(parser: argparse.ArgumentParser, opts: list[str]) -> None:
    """Refuses options behind KEY VALUE pairs, and keys without a value."""
    if late := [word for word in opts if word.startswith("--")]:
        parser.error(f"{late[0]} must come before the first KEY VALUE, {opts[0]}")
    if len(opts) % 2:
        parser.error(f"KEY VALUE must come in pairs, got {' '.join(opts)}")
