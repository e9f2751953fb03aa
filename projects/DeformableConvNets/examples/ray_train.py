#!/usr/bin/env python3
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Trains with Ray Train: Ray starts and connects the processes, and starts them again when one is lost.

    pip install "ray[train]"
    python examples/ray_train.py --workers 2 --config-file examples/nuclei_faster_rcnn_slim_R_50_FPN_mdconv_c3-c5.yaml

What follows --workers and --gpu are arguments of train_net.py. Give it paths that all machines see.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent


def train(job: dict[str, Any]) -> None:
    """What each of Ray's workers runs."""
    os.chdir(job["folder"])
    sys.path.insert(0, str(PROJECT))
    import train_net

    try:
        train_net.run(job["argv"])
    except SystemExit as error:
        if error.code:  # Ray shows the message of an exception, and counts it as a failure
            raise RuntimeError(f"train_net.py ended with: {error.code}") from None


def main() -> None:
    """Starts the workers, and waits for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes")
    parser.add_argument("--gpu", action="store_true", help="give each process a GPU")
    args, argv = parser.parse_known_args()
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        train,
        train_loop_config={"argv": ["--resume", *argv], "folder": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=args.gpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    main()
