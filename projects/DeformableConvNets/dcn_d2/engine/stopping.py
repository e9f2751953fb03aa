# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Signals during training: the first one ends it after the iteration, with a checkpoint; a second one at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from detectron2.utils import comm
from torch import distributed as dist

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The same key press or kill may arrive several times: Ctrl-C goes to all processes of a terminal and is passed on by
# the launcher as well; `timeout` signals its command and then its group. Only a later one is a second one.
SAME = 1.0


class TrainingStopped(SystemExit):
    """Training was stopped by a signal, after a checkpoint. A script that does not catch it ends with 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = number


class SignalCounter:
    """Calls one function at a first signal and another one at a second; a context.

    Does nothing where handlers cannot be set (in other threads than the main one), and for signals that the process
    ignores, as `nohup` and the background jobs of shell scripts do.
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
        """The handler that a signal had before."""
        return self._previous.get(number, signal.SIG_DFL)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._since = number, now
            self.first(number)
        elif now - self._since > SAME:
            self.second(number)


class StopRequest(SignalCounter):
    """Notes that a signal asked a training process to stop; a context around the training loop.

    `agreed` tells in all processes alike whether to stop after this iteration.
    """

    def __init__(self) -> None:
        super().__init__(self._note, self._stop_at_once)
        self.raising = False  # while nothing changes the model, as in evaluation, a signal need not wait
        self._owner = os.getpid()
        self._children: Any = None  # handler of SIGCHLD
        self._flag = torch.zeros(1, dtype=torch.uint8)

    def __exit__(self, *error: object) -> None:
        super().__exit__()
        if self._children is not None:
            signal.signal(signal.SIGCHLD, self._children)
            self._children = None

    def agreed(self) -> bool:
        """Whether any process of the job was asked to stop. All have to call this in the same iteration."""
        if comm.get_world_size() == 1:
            return self.signal != 0
        # Of CPU tensors, so that the GPU is not waited for; less than 1 ms for two processes on busy cores.
        self._flag.fill_(self.signal)
        dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
        number = int(self._flag)
        if number and not self.signal:
            self.signal, self._since = number, time.monotonic()
        return number != 0  # and not self.signal, which may have come since: the others would not know of it

    def _note(self, number: int) -> None:
        if os.getpid() != self._owner:  # a forked worker that loads data: the trainer ends it
            return
        # A signal for the whole group kills the workers that load data, and PyTorch's handler for that raises an error
        # anywhere in this process, in the middle of a step too. Without it the next batch raises the error.
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
