# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Errors of a job: which ones are mistakes of the user, and one line for each."""

from __future__ import annotations

import yaml

# What reading a config, weights or data may raise because of a mistake of the user. Other errors are mistakes in this
# code: they keep their traceback.
MISTAKES = (AssertionError, KeyError, OSError, ValueError, RecursionError, yaml.YAMLError, ImportError)


class EndedWithoutTraceback(BaseException):
    """Carries an error past Detectron2's training loop, which logs a traceback for each `Exception`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def one_line(error: BaseException) -> str:
    """Gives the message of an error without line breaks, with the name of its class where the message needs it."""
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.strerror:  # without "[Errno 28] "
        file = error.filename2 or error.filename
        message = str(error.strerror) if file is None else f"{file}: {error.strerror}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if any("Traceback (most recent call last)" in line for line in lines):  # an error in a process that loads data
        lines = lines[-1:]
    # The messages of these classes say what is wrong; a key alone does not.
    clear = (OSError, ValueError, KeyError, yaml.YAMLError, SystemExit)
    if not isinstance(error, clear) or (isinstance(error, KeyError) and " " not in message):
        lines.insert(0, f"{type(error).__name__}:")
    return " ".join(lines)
