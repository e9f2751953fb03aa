# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Collects what is wrong with a data set: each kind of fault once, with how often and where it first occurs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

SHOWN = 3  # places that a line names


class Findings:
    """Collects faults of one data set.

    Attributes:
        subject: the data set and its file, which every line begins with.
        errors: faults with which training or evaluation would stop or give wrong numbers.
        warnings: faults that change less than the user may think, or only what the line says.
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def count(
        self,
        where: Iterable[int],
        things: Sequence[Any],
        what: str,
        describe: Callable[[int], str],
        *,
        then: str = "",
        warn: bool = False,
    ) -> bool:
        """Notes a fault of some images or annotations, if there are any.

        Args:
            where: their indices.
            things: all of them.
            what: the fault, as in "annotations have no bbox".
            describe: gives the place of one in words.
            then: what it means and the way out.
            warn: it is a warning, not an error.

        Returns:
            True if there are any.
        """
        found = list(where)
        if not found:
            return False
        places = "; ".join(describe(index) for index in found[:SHOWN])
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        line = f"{len(found)} of {len(things)} {what}: {places}{more}{'. ' if then else ''}{then}"
        (self.warnings if warn else self.errors).append(line)
        return True

    def warn(self, logger: logging.Logger) -> None:
        """Logs the warnings, a line each."""
        for line in self.warnings:
            logger.warning(f"{self.subject}: {line}")

    def refuse(self) -> None:
        """Raises ValueError with all errors, if there are any."""
        if len(self.errors) == 1:
            raise ValueError(f"{self.subject}: {self.errors[0]}")
        if self.errors:
            lines = "".join(f"\n- {line}" for line in self.errors)
            raise ValueError(f"{self.subject} has {len(self.errors)} kinds of faults:{lines}")


def show(name: Any, length: int = 300) -> str:
    """A name from a file as it can be shown in a message: in one line, printable, and cut where it is long."""
    text = str(name)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= length else f"{text[:length]}…"


def shorten(value: Any, length: int = 60) -> str:
    """The `repr` of a value from a file, cut where it is long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}…"
