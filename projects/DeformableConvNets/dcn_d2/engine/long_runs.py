# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the trainer does for long trainings: the average of weights, the best model, early stop and validation loss."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import distributed as dist
from torch import nn

from ..checkpoint.fit import unwrap_module
from ..config import with_dcn_keys
from .averaging import WeightAverage, load_trained
from .best import BestCheckpointer, check_best_metric
from .hooks import EvalHook
from .validation import validation_loss

logger = logging.getLogger(__name__)


def check_long_run(cfg: CfgNode, evaluates: bool) -> None:
    """Refuses keys of long trainings that contradict each other.

    Args:
        cfg: of the run.
        evaluates: whether it evaluates as `DCNTrainer` does. A class of one's own may give any metrics.
    """
    cfg = with_dcn_keys(cfg)
    if cfg.SOLVER.EMA.ENABLED and cfg.TEST.PRECISE_BN.ENABLED:
        raise ValueError(
            "SOLVER.EMA.ENABLED and TEST.PRECISE_BN.ENABLED are both True, but PreciseBN computes the statistics of "
            "the trained model, and the average of the weights is what is evaluated: switch one of them off"
        )
    if cfg.TEST.LOSS and not cfg.DATASETS.TEST:
        raise ValueError("TEST.LOSS is True, but DATASETS.TEST is empty: there is nothing to compute a loss of")
    check_best_metric(cfg, evaluates)


def add_hooks(trainer: Any, found: list[HookBase | None]) -> list[HookBase | None]:
    """Gives the hooks of a trainer with those that its config asks for: `WeightAverage` and `BestCheckpointer`.

    Weights are averaged before a checkpoint is written. The best model is chosen after the evaluation.
    Each evaluation is written to metrics.json and the like.
    """
    for writer in found:
        if isinstance(writer, hooks.PeriodicWriter) and 0 < trainer.cfg.TEST.EVAL_PERIOD < writer._period:
            writer._period = trainer.cfg.TEST.EVAL_PERIOD  # it writes what is newest, so that evaluations would be lost
    place = next(index for index, hook in enumerate(found) if isinstance(hook, EvalHook))
    found[place] = EvalHook(trainer.cfg.TEST.EVAL_PERIOD, lambda: evaluate(trainer))
    if trainer.cfg.TEST.BEST_METRIC:
        found.insert(place + 1, BestCheckpointer(trainer.cfg, trainer.checkpointer))
    if trainer.average:
        writes = (hooks.PeriodicCheckpointer, EvalHook)
        found.insert(next(i for i, hook in enumerate(found) if isinstance(hook, writes)), trainer.average)
    return found


def evaluate(trainer: Any) -> dict[str, float]:
    """Evaluates the model of a trainer, or its average; gives all numbers by their full names, "bbox/AP"."""
    model = trainer.average.model if trainer.average else trainer.model
    _share_buffers(model)
    trainer._last_eval_results = trainer.test(trainer.cfg, model)
    found = flatten_results_dict(trainer._last_eval_results or {})
    if trainer.cfg.TEST.LOSS:
        found |= flatten_results_dict(validation_loss(trainer.cfg, unwrap_module(model)))
    return found


def _share_buffers(model: nn.Module) -> None:
    """Gives all processes of a job the main one's buffers, which are those of its checkpoints.

    BatchNorm in training does not read its running statistics, and each process has its own: without this, each would
    evaluate another model on its part of the images.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def has_stopped_early(trainer: Any) -> bool:
    """Whether the run that a trainer goes on with had stopped early; all processes call it before training."""
    found = [hook for hook in trainer._hooks if isinstance(hook, BestCheckpointer)]
    return any([hook.resume(trainer.start_iter) for hook in found])


def fit_average(trainer: Any, states: dict[str, Any]) -> None:
    """Fits what a checkpoint holds of an average of weights to a run with another SOLVER.EMA.ENABLED.

    Args:
        trainer: its model has the checkpoint's weights.
        states: of the hooks, by name. What no hook takes is removed.
    """
    name = WeightAverage.__qualname__
    if trainer.average is None and name in states:
        load_trained(trainer.checkpointer.model, states.pop(name))
        logger.warning("SOLVER.EMA.ENABLED is False: the average of the weights that the checkpoint holds is dropped")
    elif trainer.average and name not in states:
        logger.info("the checkpoint holds no average of the weights: it begins with the weights of this iteration")
