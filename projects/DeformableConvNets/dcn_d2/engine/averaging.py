# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The exponential moving average of a model's weights, SOLVER.EMA."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoint.fit import model_state

logger = logging.getLogger(__name__)


def decay_after(steps: int, decay: float, warmup: bool) -> float:
    """Gives the share of the average that the next step keeps.

    Args:
        steps: how many steps it holds already.
        decay: the share after the warm-up.
        warmup: keep only (1 + steps) / (10 + steps) while that is less.
    """
    return min(decay, (1 + steps) / (10 + steps)) if warmup else decay


def _update(decay: float, warmup: bool) -> Callable[[Any, Any, Any], None]:
    def update(averages: Any, values: Any, steps: Tensor | int) -> None:
        get_ema_multi_avg_fn(decay_after(int(steps), decay, warmup))(averages, values, steps)

    return update


class WeightAverage(HookBase):
    """Averages the weights and buffers of a model after each step of the optimizer.

    The state that it adds to a checkpoint are the trained weights, because the checkpoint's "model" is the average:
    whoever names the file in MODEL.WEIGHTS gets what was evaluated. A run that goes on from it gets both.

    Args:
        cfg: of the run.
        model: without DistributedDataParallel. The average begins with its weights as they are when training starts.

    Attributes:
        model: the average, which is evaluated and saved.
    """

    trainer: Any

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        update = _update(cfg.SOLVER.EMA.DECAY, cfg.SOLVER.EMA.WARMUP)
        self._trained = model
        self._average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
        self.model: nn.Module = self._average.module.eval()

    def before_train(self) -> None:
        if not self._average.n_averaged:  # the weights were loaded after the average was made
            self._average.update_parameters(self._trained)
        logger.info(
            f"SOLVER.EMA: evaluations use the average of the weights, and checkpoints hold it; it has "
            f"{int(self._average.n_averaged) - 1} step(s)"
        )

    def after_step(self) -> None:
        self._average.update_parameters(self._trained)

    def state_dict(self) -> dict[str, Any]:
        return {"n_averaged": int(self._average.n_averaged), "trained": model_state(self._trained)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the state of an earlier run, whose average has been loaded into the model that is trained."""
        self.model.load_state_dict(self._trained.state_dict())
        self._average.n_averaged.fill_(state_dict["n_averaged"])
        load_trained(self._trained, state_dict)


def load_trained(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads the weights that were trained from what `WeightAverage` has saved beside their average."""
    model.load_state_dict(state["trained"])
