# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Steps of the optimizer: over several batches, and in mixed precision on CPU and GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine.train_loop import SimpleTrainer
from torch import Tensor, nn

from ..config import with_dcn_keys
from .precision import amp_dtype


def build_steps(cfg: CfgNode, model: nn.Module, loader: Iterable, optimizer: torch.optim.Optimizer) -> SimpleTrainer:
    """Gives what runs the iterations that `cfg` asks for: Detectron2's `SimpleTrainer`, or `StepTrainer`."""
    batches, dtype = with_dcn_keys(cfg).SOLVER.ACCUMULATE_BATCHES, amp_dtype(cfg)
    if batches == 1 and dtype is None:
        return SimpleTrainer(model, loader, optimizer)
    return StepTrainer(model, loader, optimizer, batches, dtype)


class StepTrainer(SimpleTrainer):
    """A `SimpleTrainer` whose iteration is one step of the optimizer over several batches, in mixed precision if asked.

    The gradients of a step are the mean of those of its batches, as are the losses that are logged. The processes of a
    job exchange them once in a step. In float16 losses are scaled, as in Detectron2's `AMPTrainer`; bfloat16 has the
    range of float32, and needs no scale. Gradients are clipped by the optimizer (Detectron2 puts that into its `step`):
    after all batches, and without the scale.

    Args:
        model: gives a dictionary of losses.
        loader: gives batches without an end.
        optimizer: of the model's parameters.
        batches: how many of them make a step.
        dtype: float16 or bfloat16 for mixed precision, None for float32.

    Attributes:
        before_batch: called before each batch is taken from the loader.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable,
        optimizer: torch.optim.Optimizer,
        batches: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, loader, optimizer)
        self.batches, self.dtype = batches, dtype
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == torch.float16)
        self.before_batch: Callable[[], None] | None = None

    def run_step(self) -> None:
        """One step of the optimizer."""
        if not self.model.training:
            raise RuntimeError("the model was changed to evaluation mode, and cannot train")
        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        data_time = 0.0
        for number in range(self.batches):
            if self.before_batch:
                self.before_batch()
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            with self._exchange(last=number == self.batches - 1):
                for name, loss in self._backward(batch).items():
                    sums[name] = sums[name] + loss if name in sums else loss
        self.after_backward()
        self._write_metrics({name: value / self.batches for name, value in sums.items()}, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _backward(self, batch: Any) -> dict[str, Tensor]:
        """Adds the gradients of one batch; returns its losses."""
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
            losses = self.model(batch)
            losses = {"total_loss": losses} if isinstance(losses, Tensor) else losses
            total = sum(losses.values())
        self.grad_scaler.scale(total / self.batches).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _exchange(self, last: bool) -> contextlib.AbstractContextManager:
        """With several processes, only the last batch of a step exchanges the gradients, those of all its batches."""
        if last or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):  # the run may have begun in another type
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
