# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A hook that notes for the report when a training started and how it ended."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase

from ..report.runs import begin_run, end_run
from .errors import one_line
from .stopping import ending

logger = logging.getLogger(__name__)


class RunRecorder(HookBase):
    """Writes OUTPUT_DIR/runs.json. That it cannot is a warning: a report is not worth a training."""

    trainer: Any

    def before_train(self) -> None:
        self._try(begin_run, self.trainer.start_iter)

    def after_train(self) -> None:
        status, done = ending(), self.trainer.iter
        if status == "stopped" and done < self.trainer.max_iter:
            done += 1
        if status in ("finished", "stopped early"):
            done = self.trainer.max_iter  # after an early stop, the number of iterations until then; also when resumed
            status = "finished" if done >= self.trainer.cfg.SOLVER.MAX_ITER else "stopped early"
        self._try(end_run, done, status)

    def _try(self, note: Callable[..., None], *values: Any) -> None:
        try:
            note(self.trainer.cfg, *values)
        except Exception as error:
            logger.warning(f"runs.json, from which the report is made, cannot be written: {one_line(error)}")
