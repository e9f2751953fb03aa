# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The arguments of train_net.py."""

from __future__ import annotations

import argparse
import sys

from .check_data import add_check_data_arguments, check_check_data_arguments
from .cluster import add_cluster_arguments, check_cluster
from .exported import add_exported_argument, check_exported_evaluation
from .own_data import add_own_data_arguments, check_own_data_arguments
from .types import check_opts

# Points of AP: 0.1 for decoding and resizing images with other libraries than the publisher's, and 0.05 because the
# published numbers are rounded.
TOLERANCE = 0.15

EXAMPLES = """
examples:
  train a row of the zoo on COCO, on 8 GPUs (COCO lies in the folder that DETECTRON2_DATASETS names):
    train_net.py --num-gpus 8 --config-file configs/faster_rcnn_R_50_FPN_1x_mdconv_c3-c5.yaml
  train on your own data in COCO's format, from the detector that was trained on COCO:
    train_net.py --config-file ... --train-json a.json --train-images DIR --test-json b.json --test-images DIR
      --from-published --epochs 12 OUTPUT_DIR output/mine
  go on after an interruption (Ctrl-C and SIGTERM leave a checkpoint):
    train_net.py --resume --num-gpus 8 --config-file ...
  evaluate a model:
    train_net.py --eval-only --config-file ... MODEL.WEIGHTS output/model_final.pth
  evaluate an exported model, on the data that its config names:
    train_net.py --eval-only --model model.onnx
  evaluate the published weights of a row and compare with the published AP:
    train_net.py --published --num-gpus 8 --config-file configs/faster_rcnn_R_50_FPN_1x_mdconv_c3-c5.yaml
  the same without a network, with a copy of the published file:
    train_net.py --published --config-file ... PUBLISHED.WEIGHTS /path/to/faster_rcnn_..._20200130-d099253b.pth
  look at the data first: what is wrong with it, and how it looks:
    train_net.py --check-data --config-file ...
  the same 8 GPUs under torchrun, which starts the processes again when one of them fails:
    torchrun --standalone --nproc-per-node 8 --max-restarts 3 train_net.py --config-file ...
  as a job of Slurm, which is requeued at its time limit and goes on by itself:
    train_net.py --slurm partition=gpu nodes=2 gpus=8 hours=12 --config-file ...
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
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start a new training in a used OUTPUT_DIR; its checkpoints are removed",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST; no training")
    parser.add_argument(
        "--published",
        action="store_true",
        help="fetch and evaluate the published weights of a row of the zoo; fails if an AP is more than "
        f"{TOLERANCE} away from the published one",
    )
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
    add_exported_argument(parser, "with --eval-only: an exported model to evaluate in place of MODEL.WEIGHTS")
    add_own_data_arguments(parser)
    add_check_data_arguments(parser)
    add_cluster_arguments(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values to override")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_cluster(parser, args, sys.argv[1:] if argv is None else argv)
    if args.num_gpus < 1 or args.num_machines < 1:
        parser.error(f"--num-gpus and --num-machines must be at least 1, got {args.num_gpus} and {args.num_machines}")
    if not 0 <= args.machine_rank < args.num_machines:
        parser.error(f"--machine-rank must be below --num-machines, got {args.machine_rank} and {args.num_machines}")
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error("several machines need --dist-url tcp://FIRST_MACHINE:PORT")
    check_opts(parser, args.opts)
    if args.published and (args.resume or "MODEL.WEIGHTS" in args.opts):
        parser.error(
            "--published chooses the weights: leave out --resume and MODEL.WEIGHTS (PUBLISHED.WEIGHTS may be set)"
        )
    if not (args.config_file or args.opts or args.check_data or args.model is not None):
        parser.error("--config-file FILE is needed (--help has examples)")
    check_exported_evaluation(parser, args)
    check_check_data_arguments(parser, args)
    args.eval_only |= args.published
    check_own_data_arguments(parser, args)
    if args.overwrite and (args.resume or args.eval_only):
        parser.error("--overwrite starts a new training: leave out --resume, --eval-only and --published")
    return args
