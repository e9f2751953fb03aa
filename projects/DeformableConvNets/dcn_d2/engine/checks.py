# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What is checked before the first iteration, so that a run does not fail after hours."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm


def check_batch_size(cfg: CfgNode, processes: int | None = None) -> None:
    """Refuses a batch that the processes of the job cannot share evenly; by default, of the job that runs now."""
    processes = processes or comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, but must be a multiple of the number of processes, "
            f"{processes}"
        )


def check_expected_results(cfg: CfgNode) -> None:
    """Checks that TEST.EXPECTED_RESULTS can be compared with the evaluation's results."""
    expected = cfg.TEST.EXPECTED_RESULTS
    if len(expected) and not cfg.DATASETS.TEST:
        raise ValueError("TEST.EXPECTED_RESULTS is set, but DATASETS.TEST is empty: there will be nothing to compare")
    for entry in expected:
        if not (
            isinstance(entry, (list, tuple))
            and len(entry) == 4
            and all(isinstance(text, str) for text in entry[:2])
            and all(isinstance(number, numbers.Real) for number in entry[2:])
        ):
            raise ValueError(
                f"TEST.EXPECTED_RESULTS must hold entries like ['bbox', 'AP', 41.3, 0.5] (task, metric, value, "
                f"tolerance), got {entry!r}"
            )


def check_evaluators(names: Iterable[str]) -> None:
    """Refuses data sets that need another evaluation than COCO's."""
    for name in names:
        kind = MetadataCatalog.get(name).get("evaluator_type", None)
        if kind not in (None, "coco"):
            raise ValueError(
                f"data set {name} has the evaluator {kind}, which is not supported yet: DCNTrainer evaluates as "
                "COCO does. Use the evaluators of Detectron2's tools/train_net.py, by overriding "
                "DCNTrainer.build_evaluator"
            )


def check_keypoint_sigmas(cfg: CfgNode) -> None:
    """Refuses keypoints without a tolerance for each; by itself, COCO's evaluation has those of COCO's 17 keypoints."""
    if not (cfg.MODEL.KEYPOINT_ON and cfg.DATASETS.TEST):
        return
    keypoints, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    if sigmas != keypoints and (sigmas or keypoints != 17):
        raise ValueError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} values, but MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {keypoints}: "
            "COCO's evaluation needs a tolerance for each keypoint (empty: those of COCO's 17)"
        )


def check_no_augmentation(cfg: CfgNode) -> None:
    """Refuses TEST.AUG.ENABLED."""
    if cfg.TEST.AUG.ENABLED:
        raise ValueError(
            "TEST.AUG.ENABLED is True, but test-time augmentation is not supported yet, and the results would be those "
            "without it: use GeneralizedRCNNWithTTA as in Detectron2's tools/train_net.py"
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
