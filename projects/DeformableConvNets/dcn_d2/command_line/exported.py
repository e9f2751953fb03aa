# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The argument --model of train_net.py, demo.py and predict.py: an exported model in place of config and weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

# What an exported graph has fixed: config keys that begin with these would change nothing.
_FIXED = ("MODEL.", "INPUT.FORMAT", "INPUT.CANVAS_TEST", "TEST.DETECTIONS_PER_IMAGE")


def add_exported_argument(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds --model; `text` says what the script does with it."""
    parser.add_argument("--model", metavar="FILE", help=f"{text} (.onnx, .xml, .pt2 or .ts, see export.py)")


def find_fixed_key(opts: Sequence[Any]) -> str:
    """Gives the first of KEY VALUE pairs that an exported graph has fixed, "" if none is. All of it is on the CPU."""
    pairs = zip(opts[::2], opts[1::2])
    return next((str(k) for k, value in pairs if k.startswith(_FIXED) and (k, value) != ("MODEL.DEVICE", "cpu")), "")


def check_exported(parser: argparse.ArgumentParser, args: argparse.Namespace, *others: str) -> None:
    """Refuses what does not go together with --model.

    Args:
        parser: for the message.
        args: what it has parsed.
        others: arguments that --model takes the place of, or that need the model in torch, for example "weights".
    """
    if args.model is None:
        return
    if not args.model:
        parser.error("--model names no file")
    if other := next((name for name in others if getattr(args, name)), None):
        parser.error(f"--model has config and weights of its own: leave out --{other.replace('_', '-')}")
    if key := find_fixed_key(args.opts):
        parser.error(f"{key} is fixed in the exported model: leave it out, or export the model with it")


def check_exported_evaluation(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what does not go together with --model of train_net.py, which evaluates."""
    if args.model is not None and not args.eval_only:
        parser.error("--model is for evaluation: an exported model cannot be trained, add --eval-only")
    check_exported(parser, args, "published", "resume", "check_data", "train_json")
