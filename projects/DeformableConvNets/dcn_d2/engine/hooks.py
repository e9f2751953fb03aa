# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Hooks of the trainer: they end training when a signal asks for it, also during an evaluation."""

from __future__ import annotations

from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ..evaluation import without_augmentation
from .stopping import TrainingStopped


class StopHook(HookBase):
    """Ends training after an iteration in which a signal asked for it, in all processes after the same one."""

    trainer: Any

    def after_step(self) -> None:
        if self.trainer.stop.agreed():
            try:
                self.trainer.save_and_stop()
            finally:
                comm.synchronize()  # each process waits here until the checkpoint is complete


class EvalHook(hooks.EvalHook):
    """Detectron2's hook, except that a signal ends it at once: clusters do not wait for an evaluation on COCO.

    Test-time augmentation (TEST.AUG), which takes many times as long, is for the evaluation after training only.
    """

    trainer: Any
    _during_training = False

    def after_step(self) -> None:
        self._during_training = True
        try:
            super().after_step()
        finally:
            self._during_training = False

    def _do_eval(self) -> None:
        stop = self.trainer.stop
        stop.raising = True
        try:
            if stop.signal:
                raise TrainingStopped(stop.signal)
            self._evaluate()
            # Code that catches every exception may have caught `TrainingStopped`.
            if stop.signal and comm.get_world_size() == 1:
                raise TrainingStopped(stop.signal)
        except (TrainingStopped, Exception):
            if not stop.signal:
                raise
            # Any other exception comes from gathering results with a process that the signal has ended.
            self._save_and_stop()
        finally:
            stop.raising = False

    def _evaluate(self) -> None:
        cfg = self.trainer.cfg
        self.trainer.cfg = without_augmentation(cfg) if self._during_training else cfg  # what is called reads it
        try:
            super()._do_eval()
        finally:
            self.trainer.cfg = cfg

    def _save_and_stop(self) -> None:
        self.trainer.stop.raising = False
        # After the last iteration, `iter` is one more than its number.
        self.trainer.iter = min(self.trainer.iter, self.trainer.max_iter - 1)
        self.trainer.save_and_stop()

    def after_train(self) -> None:
        # Detectron2 would evaluate if it failed in the last iteration, and again what has led to an early stop.
        if self.trainer.failed or self.trainer.stopped_early:
            self._eval_after_train = False
        super().after_train()
