# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The model of a command line: its config, its weights, and what to do where there are none."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from ..checkpoint import UntrainedError
    from ..engine import DCNPredictor

_IMAGENET = "detectron2://ImageNetPretrained/"
_ADVICE = "--weights FILE names those of a trained model"


def read_config(args: argparse.Namespace) -> CfgNode:
    """Builds the config from the command line; a config for the GPU runs on the CPU where there is no GPU.

    Args:
        args: config_file (a file, or the name of a row of the zoo), weights, published, opts. Or an exported model, and
            opts: it is opened as `args.exported`.
    """
    from .. import model_zoo
    from ..config.published import use_published_weights
    from ..engine import fit_to_machine, load_config
    from ..export.settings import read_exported

    if getattr(args, "model", None):
        return read_exported(args)
    cfg = load_config(model_zoo.find_config_file(args.config_file), args.opts)
    if args.published:
        use_published_weights(cfg, "--published", args.config_file)
    elif args.weights is not None:
        cfg.MODEL.WEIGHTS = args.weights
    fit_to_machine(cfg)
    return cfg


def check_weights(args: argparse.Namespace, cfg: CfgNode, program: str) -> None:
    """Refuses a config whose MODEL.WEIGHTS are none, or those that training starts from, before they are fetched.

    Args:
        args: the command line.
        cfg: what `read_config` gave for it.
        program: the name of the script, for the message.

    Raises:
        ValueError: The message has the command that would load trained weights.
    """
    if not cfg.MODEL.WEIGHTS:
        raise ValueError(f"no weights are given: {_ADVICE}{_hint(args, cfg, program)}")
    from ..checkpoint.path_handlers import IMAGENET

    if cfg.MODEL.WEIGHTS.startswith((_IMAGENET, *IMAGENET, *IMAGENET.values())):
        raise ValueError(
            f"the heads are not trained: MODEL.WEIGHTS is {cfg.MODEL.WEIGHTS}, from which training starts. "
            f"{_ADVICE}{_hint(args, cfg, program)}"
        )


def build_predictor(args: argparse.Namespace, cfg: CfgNode, program: str, **options: Any) -> DCNPredictor:
    """Builds the model and loads its weights, or takes the exported one that `read_config` has opened.

    Args:
        args, cfg, program: as in `check_weights`.
        options: the predictor's.
    """
    from ..checkpoint import UntrainedError
    from ..engine import DCNPredictor
    from ..export.predictor import ExportedPredictor

    if getattr(args, "model", None):
        return ExportedPredictor(args.exported, opts=args.opts, **options)
    check_weights(args, cfg, program)
    try:
        return DCNPredictor(cfg, **options)
    except UntrainedError as error:
        raise explain_untrained(error, args, cfg, program) from error


def explain_untrained(error: UntrainedError, args: argparse.Namespace, cfg: CfgNode, program: str) -> ValueError:
    """Gives the error with the advice that fits the command line; arguments as in `check_weights`."""
    return ValueError(f"{error.reason}. {_ADVICE}{_hint(args, cfg, program)}")


def _hint(args: argparse.Namespace, cfg: CfgNode, program: str) -> str:
    """Gives the command that takes a row's published weights; "" if nothing is published."""
    if not cfg.PUBLISHED.WEIGHTS:
        return ""
    command = shlex.join([program, "--config-file", args.config_file, "--published"])
    return f"; the published ones of this row are loaded by: {command} …"
