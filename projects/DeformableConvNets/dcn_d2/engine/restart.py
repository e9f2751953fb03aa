# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What a job that is started again knows of its earlier start: whether the run in OUTPUT_DIR is its own."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import distributed as dist

KEY = "dcn_d2/training has begun"


class Mark(Protocol):
    """A mark of a job, which stays when its processes end and are started again."""

    def is_set(self) -> bool:
        """Whether an earlier start of this job has begun to train."""

    def set(self) -> None:
        """Notes that this job has begun to train."""


@dataclass(frozen=True)
class StoreMark:
    """A mark in the store of torchrun, which lives as long as torchrun runs on the first machine."""

    address: str
    port: int

    def _store(self) -> dist.TCPStore:
        wait = timedelta(seconds=60)
        return dist.TCPStore(self.address, self.port, is_master=False, wait_for_workers=False, timeout=wait)

    def is_set(self) -> bool:
        return self._store().check([KEY])

    def set(self) -> None:
        self._store().set(KEY, "1")


@dataclass(frozen=True)
class FileMark:
    """A mark that is a file."""

    path: str

    def is_set(self) -> bool:
        return os.path.exists(self.path)

    def set(self) -> None:
        Path(self.path).touch()


def find_mark(environ: Mapping[str, str] = os.environ) -> Mark | None:
    """Gives the mark of the job that torchrun has started; None under other launchers, which do not start it again."""
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return StoreMark(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]))


def go_on_after_restart(args: Namespace, mark: Mark | None) -> None:
    """Makes a job that has been started again go on with its own run, whatever its command line says.

    An earlier run of another job keeps its protection: without the mark, the arguments stay.

    Args:
        args: the command line; `resume` and `overwrite` are changed.
        mark: of this job.
    """
    if mark and not args.eval_only and mark.is_set():
        args.resume, args.overwrite = True, False


class MarkHook(HookBase):
    """Sets the mark of a job when training begins, and OUTPUT_DIR holds nothing but this run."""

    def __init__(self, mark: Mark) -> None:
        self.mark = mark

    def before_train(self) -> None:
        if comm.is_main_process():
            self.mark.set()
