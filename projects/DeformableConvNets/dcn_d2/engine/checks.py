# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What is checked before the first iteration, so that a run does not fail after hours."""

from __future__ import annotations

import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm


def check_batch_size(cfg: CfgNode, processes: int | None = None) -> None:
    """Refuses a batch that the processes of the job cannot share evenly; by default, of the job that runs now."""
    processes = processes or comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, but must be a multiple of the number of processes, "
            f"{processes}"
        )


def check_weights_exist(cfg: CfgNode, needed: bool) -> None:
    """Refuses a MODEL.WEIGHTS that is a path without a file. Addresses are checked when they are fetched.

    Args:
        cfg: of the run.
        needed: also refuse an empty MODEL.WEIGHTS.
    """
    weights = cfg.MODEL.WEIGHTS
    if not weights and needed:
        raise ValueError(
            "the heads are not trained: MODEL.WEIGHTS is empty, so that an evaluation would give an AP of 0. Name a "
            "trained model, MODEL.WEIGHTS output/model_final.pth, or take the last checkpoint of OUTPUT_DIR by --resume"
        )
    path = weights.partition("?")[0]  # Detectron2 allows options after it
    if weights and "://" not in weights and not os.path.isfile(path):
        raise FileNotFoundError(f"MODEL.WEIGHTS: there is no file {path} (now in {os.getcwd()})")


def check_same_iteration(iteration: int) -> None:
    """Refuses processes that start from different iterations: they would wait for each other for ever."""
    iterations: list[Any] = comm.all_gather(iteration)
    if len(set(iterations)) > 1:
        raise ValueError(
            f"the processes of this job would start from different iterations ({iterations}): all machines need the "
            "checkpoints of OUTPUT_DIR"
        )
