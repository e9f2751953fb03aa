# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Shows how far a command is: one line that changes on a terminal, a line every 30 seconds in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

LOG_EVERY = 30.0  # seconds
TERMINAL_EVERY = 0.5


class Progress:
    """Counts images, and shows their number, speed and the time that is left.

    Args:
        total: how many there are; 0 if that is not known.
        done: how many an earlier run has done.
        stream: where it is shown; standard error by default.
    """

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.total, self.initial, self.done = total, done, done
        self.terminal = self.stream.isatty()
        self._every = TERMINAL_EVERY if self.terminal else LOG_EVERY
        self._start = self._shown = time.monotonic()

    def add(self, number: int) -> None:
        """Counts images that are done now."""
        self.done += number
        if time.monotonic() - self._shown >= self._every:
            self.show()

    def show(self) -> None:
        """Shows the line now."""
        self._shown = time.monotonic()
        end = "" if self.terminal else "\n"
        start = "\r\033[K" if self.terminal else ""
        self.stream.write(f"{start}{self.line()}{end}")
        self.stream.flush()

    def line(self) -> str:
        """Gives the line; estimates count the images of this run only."""
        elapsed = time.monotonic() - self._start
        speed = (self.done - self.initial) / elapsed if elapsed > 0 else 0.0
        total = f" of {max(self.total, self.done)}" if self.total else ""
        left = ""
        if self.total > self.done and speed > 0:
            left = f", {tqdm.format_interval((self.total - self.done) / speed)} left"
        return f"{self.done}{total} images, {speed:.1f} a second{left}"

    def end(self) -> None:
        """Shows the last line, and leaves it."""
        self.show()
        if self.terminal:
            self.stream.write("\n")
            self.stream.flush()
