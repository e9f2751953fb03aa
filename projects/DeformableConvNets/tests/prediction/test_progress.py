# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The line that shows how far a command is."""

from __future__ import annotations

import io
import time

import pytest

from dcn_d2.prediction.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_30_seconds(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(1000, done=400, stream=stream)
    for second in range(1, 101):
        clock[0] = second
        progress.add(2)
    progress.end()
    assert stream.getvalue().splitlines() == [
        "460 of 1000 images, 2.0 a second, 04:30 left",
        "520 of 1000 images, 2.0 a second, 04:00 left",
        "580 of 1000 images, 2.0 a second, 03:30 left",
        "600 of 1000 images, 2.0 a second, 03:20 left",
    ]


def test_a_terminal_has_one_line_that_changes(clock: list[float]) -> None:
    stream = Terminal()
    progress = Progress(0, stream=stream)  # as of a video whose length is not known
    for tenth in range(1, 21):
        clock[0] = tenth / 10
        progress.add(1)
    progress.end()
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.endswith("\r\033[K20 images, 10.0 a second\n")
    assert text.count("\r") == 5
