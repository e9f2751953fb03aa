#!/usr/bin/env python3
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Trains and evaluates deformable detectors; takes the arguments of Detectron2's tools/train_net.py.

PyTorch and Detectron2 are imported in the functions, so that --help and mistyped arguments answer at once.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dcn_d2.quiet import silence_detectron2_warnings

silence_detectron2_warnings()  # here, because each process of a distributed job imports this file first

EXAMPLES = """
examples:
  train a row of the zoo on COCO, on 8 GPUs (COCO lies in the folder that DETECTRON2_DATASETS names):
    train_net.py --num-gpus 8 --config-file configs/faster_rcnn_R_50_FPN_1x_mdconv_c3-c5.yaml
  go on after an interruption:
    train_net.py --num-gpus 8 --config-file ... --resume
  evaluate a model:
    train_net.py --eval-only --config-file ... MODEL.WEIGHTS output/model_final.pth
  train on 2 machines with 8 GPUs each, the second one with --machine-rank 1:
    train_net.py --num-machines 2 --machine-rank 0 --num-gpus 8 --dist-url tcp://FIRST_MACHINE:29500 --config-file ...
"""


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser: the arguments of `detectron2.engine.default_argument_parser`, without its import time."""
    parser = argparse.ArgumentParser(
        description="Train and evaluate deformable detectors.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML of the model, data and schedule")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR, if any")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST; no training")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine; without GPUs they share the CPU",
    )
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines that train together")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="I", help="number of this machine, from 0")
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="address at which the processes meet; the default finds a free port on a single machine",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values to override")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.num_gpus < 1 or args.num_machines < 1:
        parser.error(f"--num-gpus and --num-machines must be at least 1, got {args.num_gpus} and {args.num_machines}")
    if not 0 <= args.machine_rank < args.num_machines:
        parser.error(f"--machine-rank must be below --num-machines, got {args.machine_rank} and {args.num_machines}")
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error("several machines need --dist-url tcp://FIRST_MACHINE:PORT")
    if len(args.opts) % 2:
        parser.error(f"KEY VALUE must come in pairs, got {' '.join(args.opts)}")
    return args


def check_job(args: argparse.Namespace) -> None:
    """Finds what cannot work before processes are started: config, data sets, number of GPUs."""
    import torch

    from dcn_d2.engine import check_data_sets, load_config

    cfg = load_config(args.config_file, args.opts)
    check_data_sets([*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST])
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and args.num_gpus > gpus:
        raise ValueError(f"--num-gpus is {args.num_gpus}, but this machine has {gpus}")


def main(args: argparse.Namespace) -> Any:
    """Runs one process of the job; returns the evaluation's results in the main process."""
    from detectron2.evaluation import verify_results
    from detectron2.utils import comm

    from dcn_d2.checkpoint import DCNCheckpointer
    from dcn_d2.engine import DCNTrainer, setup

    cfg = setup(args)
    if not args.eval_only:
        trainer = DCNTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    model = DCNTrainer.build_model(cfg)
    DCNCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = DCNTrainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def run(argv: list[str] | None = None) -> None:
    """Runs the command line, in as many processes as it asks for."""
    args = parse_arguments(argv)
    try:
        check_job(args)
    except (AssertionError, KeyError, OSError, ValueError) as error:  # all that reading a config may raise
        message = error.args[0] if isinstance(error, KeyError) else error
        sys.exit(f"train_net.py: {message}")
    from detectron2.engine import launch

    launch(main, args.num_gpus, args.num_machines, args.machine_rank, dist_url=args.dist_url, args=(args,))


if __name__ == "__main__":
    run()
