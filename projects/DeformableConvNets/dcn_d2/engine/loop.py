# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Detectron2's training loop, which ends on a signal with a checkpoint, and on a mistake without a traceback."""

from __future__ import annotations

import logging
import sys
from typing import Any

from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm

from .errors import MISTAKES, EndedWithoutTraceback
from .hooks import EvalHook, StopHook
from .steps import StepTrainer
from .stopping import StoppedEarly, StopRequest, TrainingStopped

logger = logging.getLogger(__name__)


class _Loop(TrainerBase):
    """Detectron2's loop, below `DefaultTrainer`: an early stop ends it as its last iteration does."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            super().train(*args, **kwargs)
        except StoppedEarly:
            self.iter += 1


class StoppableTrainer(DefaultTrainer, _Loop):
    """A `DefaultTrainer` that a signal ends after the iteration; `__init__` of a subclass sets `stop`."""

    iter: int
    max_iter: int
    stop: StopRequest
    failed = False  # whether an error has ended training
    stopped_early = False  # whether TEST.PATIENCE has ended it, after an evaluation
    _phase = ""  # what the iteration is doing: "data", "model" or "optimizer"

    def train(self) -> Any:
        """Trains.

        Raises:
            TrainingStopped: A signal asked for it; a checkpoint was written.
        """
        # Only while training: a model with hooks cannot be pickled.
        marks = [
            self.model.register_forward_pre_hook(lambda *_: setattr(self, "_phase", "model")),
            self.optimizer.register_step_pre_hook(lambda *_: setattr(self, "_phase", "optimizer")),
        ]
        if isinstance(steps := self._trainer, StepTrainer):
            steps.before_batch = lambda: setattr(self, "_phase", "data")
        try:
            with self.stop:
                return super().train()
        except EndedWithoutTraceback as ended:
            raise ended.error from None
        finally:
            for mark in marks:
                mark.remove()
            if isinstance(steps, StepTrainer):
                steps.before_batch = None

    def build_hooks(self) -> list[HookBase]:
        """Gives Detectron2's hooks, and `StopHook` after the one that writes checkpoints and before the evaluation."""
        found = super().build_hooks()
        place = next(index for index, hook in enumerate(found) if isinstance(hook, hooks.EvalHook))
        evaluate = found[place]._func
        found[place : place + 1] = [StopHook(), EvalHook(self.cfg.TEST.EVAL_PERIOD, evaluate)]
        return found

    def run_step(self) -> None:
        """One iteration."""
        self._phase = "data"
        try:
            super().run_step()
        except (RuntimeError, EOFError, *MISTAKES) as error:
            # The signal may also have ended a process that loads data, or another process of the job. Then the next
            # call fails before `StopHook` could ask whether to stop, with an EOFError if the process ended while it
            # handed a batch over. Until the optimizer changes the weights, they are those of the last iteration.
            if self.stop.signal and self._phase != "optimizer":
                self.iter -= 1
                self.save_and_stop()
            if self._phase == "data" and isinstance(error, MISTAKES):
                raise EndedWithoutTraceback(error) from error
            raise

    def after_step(self) -> None:
        """Calls the hooks. Their errors of the file system, for example a full disk, get no traceback in the log."""
        try:
            super().after_step()
        except OSError as error:
            raise EndedWithoutTraceback(error) from error
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch.save raises it when the disk is full
                raise EndedWithoutTraceback(error.__context__) from error
            raise

    def after_train(self) -> None:
        """Calls the hooks. Their errors do not replace the error that has ended training."""
        reason = sys.exc_info()[1]
        if isinstance(reason, StoppedEarly):  # the hooks meet what they meet after the last iteration
            reason = None
            self.max_iter = self.iter + 1
        self.failed = reason is not None
        try:
            super().after_train()
        except OSError as error:
            if reason is None:
                raise EndedWithoutTraceback(error) from error
            logger.error(f"after training: {error}")

    def stop_early(self) -> None:
        """Ends training after this iteration as if it were the last one; all processes call it in the same one."""
        if comm.is_main_process():
            self.checkpointer.save("model_final", iteration=self.iter)
        self.stopped_early = True
        raise StoppedEarly

    def save_and_stop(self) -> None:
        """Writes a checkpoint of the last finished iteration, if there is none yet, and ends training."""
        if comm.is_main_process():
            saved = (self.iter + 1) % self.cfg.SOLVER.CHECKPOINT_PERIOD == 0 or self.iter >= self.max_iter - 1
            if self.iter >= self.start_iter and not saved:
                try:
                    self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)
                except OSError as error:
                    raise EndedWithoutTraceback(error) from error
            logger.warning(f"stopped at iteration {self.iter}, go on with --resume" if self.iter >= 0 else "stopped")
        raise TrainingStopped(self.stop.signal)
