# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Changes a config so that it suits the machine and the batch size."""

from __future__ import annotations

import logging
import os

import torch
from detectron2.config import CfgNode

from ..config import with_dcn_keys
from .precision import why_not_on_cpu

logger = logging.getLogger(__name__)


def fit_to_machine(cfg: CfgNode, processes: int = 1) -> None:
    """Changes in `cfg` what this machine cannot do, and says so in the log.

    Without a GPU, the device becomes the CPU. On a CPU, mixed precision is switched off unless the processor gains by
    it, at most one worker for each core loads data, and several processes share the cores.

    Args:
        cfg: changed in place.
        processes: how many processes of this job run on this machine.
    """
    fit_device(cfg)
    if cfg.MODEL.DEVICE != "cpu":
        return
    if cfg.SOLVER.AMP.ENABLED and (reason := why_not_on_cpu(with_dcn_keys(cfg).SOLVER.AMP.DTYPE)):
        logger.warning(f"SOLVER.AMP.ENABLED is switched off: {reason}")
        cfg.SOLVER.AMP.ENABLED = False
    if processes > 1 and torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is cpu with {processes} processes, but Detectron2 connects processes through the GPUs "
            "where there are any; hide them with CUDA_VISIBLE_DEVICES="
        )
    cores = count_cores()
    # With several processes, each loads its data itself: starting workers took tens of seconds on 2 cores.
    workers = cores if processes == 1 else 0
    if cfg.DATALOADER.NUM_WORKERS > workers:
        logger.info(
            f"DATALOADER.NUM_WORKERS goes from {cfg.DATALOADER.NUM_WORKERS} to {workers}: there are {cores} cores "
            f"for {processes} process(es)"
        )
        cfg.DATALOADER.NUM_WORKERS = workers
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores // processes))
    elif processes > 1 and os.environ["OMP_NUM_THREADS"] == "1" and cores >= 2 * processes:  # torchrun sets it to 1
        logger.info(
            f"OMP_NUM_THREADS is 1: {processes} processes use {processes} of {cores} cores. "
            f"OMP_NUM_THREADS={cores // processes} would use all"
        )


def fit_device(cfg: CfgNode) -> None:
    """Changes MODEL.DEVICE to the CPU if there is no GPU; `fit_to_machine` does it too."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.info(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but there is no GPU: running on the CPU")
        cfg.MODEL.DEVICE = "cpu"


def scale_learning_rate(cfg: CfgNode) -> None:
    """Scales BASE_LR to the batch size if SOLVER.REFERENCE_IMS_PER_BATCH says which batch size it is meant for."""
    reference, batch_size = with_dcn_keys(cfg).SOLVER.REFERENCE_IMS_PER_BATCH, effective_batch_size(cfg)
    if reference <= 0 or reference == batch_size:
        return
    scaled = cfg.SOLVER.BASE_LR * batch_size / reference
    logger.info(
        f"SOLVER.BASE_LR goes from {cfg.SOLVER.BASE_LR:g} to {scaled:g}: it is meant for a batch of {reference}, and "
        f"{_name_of_batch_size(cfg)} is {batch_size} (SOLVER.REFERENCE_IMS_PER_BATCH 0 leaves it alone; MAX_ITER and "
        "STEPS are never scaled)"
    )
    cfg.SOLVER.BASE_LR = scaled
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = batch_size  # so that the saved config is not scaled again


def effective_batch_size(cfg: CfgNode) -> int:
    """Gives the number of images of one step of the optimizer, in all batches and processes."""
    return cfg.SOLVER.IMS_PER_BATCH * with_dcn_keys(cfg).SOLVER.ACCUMULATE_BATCHES


def _name_of_batch_size(cfg: CfgNode) -> str:
    several = with_dcn_keys(cfg).SOLVER.ACCUMULATE_BATCHES > 1
    return "SOLVER.IMS_PER_BATCH times ACCUMULATE_BATCHES" if several else "SOLVER.IMS_PER_BATCH"


def count_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
