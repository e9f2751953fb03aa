# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The losses of a model on the test sets, TEST.LOSS."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from ..config import with_dcn_keys
from ..data.mapper import DCNDatasetMapper
from ..data.transforms import build_augmentation
from .random_numbers import random_numbers_kept

logger = logging.getLogger(__name__)

NAME = "validation_loss"


def check_annotations(cfg: CfgNode) -> None:
    """Refuses TEST.LOSS for test sets without annotations, as those of a challenge are."""
    for name in cfg.DATASETS.TEST if with_dcn_keys(cfg).TEST.LOSS else ():
        if not any(entry.get("annotations") for entry in DatasetCatalog.get(name)):
            raise ValueError(
                f"TEST.LOSS is True, but data set {name} of DATASETS.TEST has no annotations to compute a loss from"
            )


def validation_loss(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """Computes the losses of a model on the test sets, in float32; all processes of the job share the images.

    The model is copied, because losses are computed in training mode, in which some models change themselves. Layers
    of BatchNorm use their running statistics, as in inference, and nothing is dropped out. Images are resized as for
    the evaluation, and come one by one. Anchors and proposals are sampled as in training, with the same random numbers
    each time; the random numbers of the training go on as if nothing had been drawn.

    Args:
        cfg: of the run.
        model: without DistributedDataParallel.

    Returns:
        The mean over the images of "validation_loss" and of each of its parts, "validation_loss/loss_cls" and so on;
        with several test sets a dictionary of those for each. Empty in other processes than the main one.
    """
    model = _fixed_copy(model)
    found: dict[str, Any] = {}
    for name in cfg.DATASETS.TEST:
        mapper = DCNDatasetMapper(cfg, is_train=True, augmentations=build_augmentation(cfg, False))
        with torch.no_grad(), random_numbers_kept(seed=0), EventStorage():
            found[name] = _mean_losses(model, build_detection_test_loader(cfg, name, mapper=mapper))
    return (next(iter(found.values())) if len(found) == 1 else found) if comm.is_main_process() else {}


def _fixed_copy(model: nn.Module) -> nn.Module:
    """Gives a copy in training mode whose results depend on nothing but its weights and its input."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
            module.eval()
        if hasattr(module, "vis_period"):
            setattr(module, "vis_period", 0)  # noqa: B010  no pictures of it
    return model


def _mean_losses(model: nn.Module, loader: Iterable) -> dict[str, float]:
    """Gives the mean losses over the batches of all processes."""
    sums: dict[str, float] = {}
    count, infinite = 0, ""
    for batch in loader:
        count += 1
        try:
            losses = model(batch)
        except FloatingPointError as error:  # so Detectron2's RPN says that it predicts infinite boxes
            infinite = str(error)
            continue
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + float(loss)
    gathered = comm.all_gather((sums, count, infinite))
    total = sum(count for _, count, _ in gathered)
    names = {name: None for sums, _, _ in gathered for name in sums}  # in their order
    means = {name: sum(sums.get(name, 0.0) for sums, _, _ in gathered) / total for name in names}
    if found := [text for _, _, text in gathered if text]:
        logger.warning(f"{NAME} is not a number: {found[0]}")
        return dict.fromkeys([NAME, *(f"{NAME}/{name}" for name in means)], math.nan)
    return {NAME: sum(means.values())} | {f"{NAME}/{name}": value for name, value in means.items()}
