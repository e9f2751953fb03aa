# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The writers of a training: console, metrics.json, TensorBoard, and the services that TRACKING.WRITERS names."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_writers
from detectron2.utils.events import EventWriter, TensorboardXWriter

from ..report.runs import read_runs
from .tracking import build_tracking_writers


class ResumableTensorboardWriter(TensorboardXWriter):
    """Detectron2's writer, which after --resume makes TensorBoard forget the iterations that are run again.

    Args:
        folder: for the event files.
        first: gives the first iteration of this training; it is asked when the first values are written.
    """

    def __init__(self, folder: str, first: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(folder, **kwargs)
        self._folder, self._first = folder, first

    @cached_property
    def _writer(self) -> Any:
        if first := self._first():
            # The evaluation after the last iteration counts as one iteration later. It stays if training was done.
            *earlier, _ = [run for run in read_runs(self._folder) if run.get("status") != "evaluated"] or [{}]
            done = bool(earlier) and earlier[-1].get("status") == "finished" and earlier[-1].get("end") == first
            self._writer_args["purge_step"] = first + done
        return super()._writer


def build_writers(cfg: CfgNode, max_iter: int, first: Callable[[], int]) -> list[EventWriter]:
    """Gives the writers of a training.

    Args:
        cfg: of the run.
        max_iter: the number of iterations, for the time that is left.
        first: gives the first iteration of this training.
    """
    writers = [writer for writer in default_writers(cfg.OUTPUT_DIR, max_iter) if type(writer) is not TensorboardXWriter]
    # TensorBoard's writer comes last: it takes the pictures out of the storage.
    return [*writers, *build_tracking_writers(cfg), ResumableTensorboardWriter(cfg.OUTPUT_DIR, first)]
