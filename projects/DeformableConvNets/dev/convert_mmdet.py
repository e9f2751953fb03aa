# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Converts a checkpoint of MMDetection into one of Detectron2, and back.

    python dev/convert_mmdet.py IN OUT              of MMDetection, any version, or an ImageNet ResNet of torchvision
    python dev/convert_mmdet.py --to-mmdet IN OUT   of a detector trained here, for MMDetection 2.x and 3.x

There is no need to convert by hand what MODEL.WEIGHTS names as mmdet://FILE. A digest at the end of IN's name is
checked. A file that exists is not overwritten without --overwrite, and IN never is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import OrderedDict
from typing import Any

import torch

from dcn_d2 import __version__
from dcn_d2.checkpoint import read_checkpoint, to_mmdet
from dcn_d2.checkpoint.files import write_atomically
from dcn_d2.checkpoint.mmdet import unwrap_state_dict
from dcn_d2.checkpoint.provenance import convert_checkpoint, read_author, warn_of_v1
from dcn_d2.checkpoint.weights import check_weights


def convert_back(checkpoint: dict[str, Any], origin: str) -> dict[str, Any]:
    """Turns the content of one of our files into that of one of MMDetection's."""
    try:
        return {"meta": {"dcn_d2_version": __version__}, "state_dict": OrderedDict(to_mmdet(checkpoint))}
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def check_target(source: str, target: str, overwrite: bool) -> None:
    """Refuses to write over the file that is read, by whatever name, or over another one without being asked to."""
    if not os.path.lexists(target):
        return
    if os.path.exists(target) and os.path.exists(source) and os.path.samefile(source, target):
        raise ValueError(f"OUT is IN: {target} and {source} are the same file, which would be lost; give another name")
    if not overwrite:
        raise FileExistsError(f"{target} exists; give another name, or --overwrite to replace it")
    if not os.path.isfile(target):
        raise ValueError(f"{target} is no file, and is not replaced")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="checkpoint to read")
    parser.add_argument("target", metavar="OUT", help="checkpoint to write")
    parser.add_argument("--to-mmdet", action="store_true", help="from Detectron2's names to MMDetection's")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args(arguments)
    try:
        check_target(args.source, args.target, args.overwrite)
        checkpoint = read_checkpoint(args.source)
        check_weights(unwrap_state_dict(checkpoint), args.source)
        converted = (convert_back if args.to_mmdet else convert_checkpoint)(checkpoint, args.source)
        warn_of_v1(read_author(converted.get("__author__")), args.source)
        with write_atomically(args.target) as file:
            torch.save(converted, file)
    except (OSError, ValueError) as error:
        sys.exit(f"convert_mmdet.py: {error}")
    weights = converted["state_dict" if args.to_mmdet else "model"]
    print(f"wrote {args.target} with {len(weights)} entries")


if __name__ == "__main__":
    main()
