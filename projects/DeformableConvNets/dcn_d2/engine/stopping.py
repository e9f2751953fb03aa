# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Signals during training: the first one ends it after the iteration, with a checkpoint; a second one at once."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from detectron2.utils import comm
from torch import distributed as dist

logger = logging.getLogger(__name__)

REQUEUE = signal.SIGUSR2  # submitit lets Slurm send it before the time limit, to requeue the job
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, REQUEUE)
# One key press or kill may arrive several times: Ctrl-C goes to all processes of a terminal, and the launcher passes it
# on as well; `timeout` signals its command and then its group. After so many seconds it counts as a second one.
SAME = 1.0


class TrainingStopped(SystemExit):
    """A signal has stopped training, after a checkpoint.

    A script that does not catch it ends with exit code 128 + signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = number


class StoppedEarly(BaseException):
    """Ends the training loop as if it had done its last iteration. Detectron2's loop logs each `Exception`."""


def ending() -> str:
    """Says how the training ends whose hooks and writers are told so now.

    Returns:
        "finished", "stopped early" (by TEST.PATIENCE), "stopped" (by a signal) or "failed".
    """
    reason = sys.exc_info()[1]
    if isinstance(reason, StoppedEarly):
        return "stopped early"
    return "stopped" if isinstance(reason, (TrainingStopped, KeyboardInterrupt)) else "failed" if reason else "finished"


class SignalCounter:
    """A context that calls one function at the first signal, and another one at the second.

    Does nothing in threads other than the main one, where handlers cannot be set. Signals that the process ignores stay
    ignored: `nohup` and background jobs of shell scripts ignore some.
    """

    def __init__(self, first: Callable[[int], None], second: Callable[[int], None]) -> None:
        self.first, self.second = first, second
        self.signal = 0
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalCounter:
        self.signal = 0
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def previous(self, number: int) -> Any:
        """Gives the handler that a signal had before."""
        return self._previous.get(number, signal.SIG_DFL)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._since = number, now
            self.first(number)
        elif number == REQUEUE:  # Slurm may send SIGTERM before or after it; both ask for the same
            self.signal = number
        elif self.signal != REQUEUE and now - self._since > SAME:
            self.second(number)


class StopRequest(SignalCounter):
    """A context around the training loop, which notes that a signal asked to stop.

    `agreed` gives the same answer in all processes: whether to stop after this iteration.
    """

    def __init__(self) -> None:
        super().__init__(self._note, self._stop_at_once)
        self.raising = False  # set during an evaluation: a signal need not wait, because nothing changes the model
        self._owner = os.getpid()
        self._children: Any = None  # handler of SIGCHLD
        self._flag = torch.zeros(1, dtype=torch.uint8)

    def __exit__(self, *error: object) -> None:
        super().__exit__()
        if self._children is not None:
            signal.signal(signal.SIGCHLD, self._children)
            self._children = None

    def agreed(self) -> bool:
        """Whether any process of the job was asked to stop. All must call this in the same iteration."""
        if comm.get_world_size() == 1:
            return self.signal != 0
        # With a CPU tensor, it does not wait for the GPU; it takes less than 1 ms for two processes on busy cores.
        self._flag.fill_(self.signal)
        dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
        number = int(self._flag)
        if number and not self.signal:
            self.signal, self._since = number, time.monotonic()
        return number != 0  # not self.signal: that may have come since, and the others would not know of it

    def _note(self, number: int) -> None:
        if os.getpid() != self._owner:  # a forked worker that loads data: the trainer ends it
            return
        # A signal for the whole group also kills the workers that load data. PyTorch's handler of SIGCHLD then raises
        # an error anywhere in this process, even in the middle of a step. Without it, the next batch raises the error.
        if (handler := signal.getsignal(signal.SIGCHLD)) not in (signal.SIG_DFL, None):
            self._children = handler
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if comm.is_main_process():
            logger.warning(
                f"{signal.Signals(number).name}: training stops after this iteration, with a checkpoint "
                "(a second signal stops it at once)"
            )
        if self.raising:
            raise TrainingStopped(number)

    def _stop_at_once(self, number: int) -> None:
        if os.getpid() == self._owner:
            logger.warning(f"{signal.Signals(number).name} again: training stops at once, without a checkpoint")
        signal.signal(number, self.previous(number))
        os.kill(os.getpid(), number)
