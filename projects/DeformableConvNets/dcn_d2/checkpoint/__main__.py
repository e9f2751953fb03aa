# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Converts weights from MMDetection's names to Detectron2's, and back.

  python -m dcn_d2.checkpoint IN OUT
      from a two-stage detector of MMDetection, of any version, or a ResNet or ResNeXt of torchvision

  python -m dcn_d2.checkpoint --to-mmdet IN OUT
      from a detector with Detectron2's names, such as train_net.py writes, to MMDetection 2.x and 3.x

IN is what MODEL.WEIGHTS may be:
  output/model_final.pth                           a file
  https://HOST/FILE.pth                            an address
  mmdet://faster_rcnn/.../FILE.pth                 a file below MMDetection's download folder
  torchvision://resnet50, torchvision://resnet101  weights that were trained on ImageNet
  open-mmlab://resnext101_32x4d
  detectron2://.../FILE.pkl                        a file of Detectron2's zoo

A digest at the end of IN's name is checked. OUT is written in one step: an interruption leaves no part of it. Training
and evaluation convert by themselves what MODEL.WEIGHTS names, so there is no need to convert a file for them.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import OrderedDict
from typing import Any

import torch

from dcn_d2 import __version__

from ..files import write_atomically
from .mmdet import to_mmdet
from .provenance import read_author, recognise, warn_of_v1
from .weights import as_data, convert_file, read_state_dict


def convert_back(path: str) -> dict[str, Any]:
    """Reads a file with Detectron2's names, and gives the content of one of MMDetection.

    Raises:
        ValueError: It has no such names, or entries that have no place in MMDetection; the message lists them.
        OSError: It cannot be read.
    """
    weights = read_state_dict(path)
    if provenance := recognise(weights):
        raise ValueError(
            f"{path} has the names of {provenance.value}, not those of Detectron2, which --to-mmdet converts"
        )
    try:
        return {"meta": {"dcn_d2_version": __version__}, "state_dict": OrderedDict(to_mmdet(weights))}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find(source: str) -> str:
    """Gives the local file for IN. Only an address needs Detectron2, and is fetched."""
    if os.path.isfile(source) or ":" not in source:
        return source
    from .path_handlers import find_weights, register_path_handlers

    register_path_handlers()
    return find_weights(source, original=True)


def check_target(source: str, target: str, overwrite: bool) -> None:
    """Refuses to write over the file that is read, by whatever name, or over another one without being asked to."""
    if not os.path.lexists(target):
        return
    if os.path.exists(target) and os.path.exists(source) and os.path.samefile(source, target):
        raise ValueError(f"OUT is IN: {target} and {source} are the same file, which would be lost; give another name")
    if not overwrite:
        raise FileExistsError(f"{target} exists; give another name, or --overwrite to replace it")
    if not os.path.isfile(target):
        raise ValueError(f"{target} is not a file, and is not replaced")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; errors end it with one line, or with a list of entries, and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m dcn_d2.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN", help="weights to read")
    parser.add_argument("target", metavar="OUT", help="file to write")
    parser.add_argument("--to-mmdet", action="store_true", help="from Detectron2's names to MMDetection's")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists; it is never IN")
    args = parser.parse_args(arguments)
    try:
        check_target(args.source, args.target, args.overwrite)  # before a download
        source = find(args.source)
        check_target(source, args.target, args.overwrite)  # an address may name a local file
        converted = convert_back(source) if args.to_mmdet else convert_file(source)
        warn_of_v1(read_author(converted.get("__author__")), source)
        with write_atomically(args.target) as file:
            torch.save(as_data(converted, source), file)  # tensors, also where a pickle had arrays
    except (ImportError, OSError, ValueError) as error:  # ImportError: an address, but no Detectron2
        sys.exit(f"dcn_d2.checkpoint: {error}")
    weights = converted["state_dict" if args.to_mmdet else "model"]
    print(f"wrote {args.target} with {len(weights)} entries")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dcn_d2").setLevel(logging.INFO)  # says what is downloaded
    main()
