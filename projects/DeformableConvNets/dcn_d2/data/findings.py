# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Collects what is wrong with a data set: each kind of fault once, with how often and where it first occurs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

SHOWN = 3  # places that a line names
EXAMPLES = 5  # places that are kept


class Fault(NamedTuple):
    """One kind of fault of a data set."""

    kind: str  # a short name, such as "box-flat"; "" where it has none
    severity: str  # "error", "warning", or "information", which only an inspection tells
    line: str  # all of it in words
    where: Sequence[int]  # indices of what has the fault
    things: Sequence[Any]  # all images, annotations or categories that were looked at
    examples: Sequence[str]  # the first places in words
    what: str  # the fault without numbers and places
    then: str  # what it means and the way out


class Findings:
    """Collects faults of one data set.

    Attributes:
        subject: the data set and its file, which every line begins with.
        errors: faults with which training or evaluation would stop or give wrong numbers.
        warnings: faults that change less than the user may think, or only what the line says.
        faults: the same with counts and places, in the order in which they were found.
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.faults: list[Fault] = []

    def note(self, line: str, *, kind: str, warn: bool = False) -> None:
        """Notes a fault of the data set as a whole.

        Args:
            line: all of it in words.
            kind: see `Fault`.
            warn: it is a warning, not an error.
        """
        self.take(Fault(kind, "warning" if warn else "error", line, (), (), (), line, ""))

    def take(self, fault: Fault) -> None:
        """Notes a fault that was found elsewhere."""
        self.faults.append(fault)
        if fault.severity != "information":
            (self.warnings if fault.severity == "warning" else self.errors).append(fault.line)

    def count(
        self,
        where: Iterable[int],
        things: Sequence[Any],
        what: str,
        describe: Callable[[int], str],
        *,
        kind: str = "",
        then: str = "",
        warn: bool = False,
        inform: bool = False,
    ) -> bool:
        """Notes a fault of some images or annotations, if there are any.

        Args:
            where: their indices.
            things: all of them.
            what: the fault, as in "annotations have no bbox".
            describe: gives the place of one in words.
            kind: see `Fault`.
            then: what it means and the way out.
            warn: it is a warning, not an error.
            inform: it is no fault, only good to know.

        Returns:
            True if there are any.
        """
        found = list(where)
        if not found:
            return False
        examples = [describe(index) for index in found[:EXAMPLES]]
        places = "; ".join(examples[:SHOWN])
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        line = f"{len(found)} of {len(things)} {what}: {places}{more}{'. ' if then else ''}{then}"
        severity = "information" if inform else "warning" if warn else "error"
        self.take(Fault(kind, severity, line, found, things, examples, what, then))
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


def repeated(values: Iterable[Hashable]) -> list[int]:
    """The indices of values that occurred before."""
    seen: set[Hashable] = set()
    found = []
    for index, value in enumerate(values):
        if value in seen:
            found.append(index)
        seen.add(value)
    return found


def show(name: Any, length: int = 300) -> str:
    """A name from a file as it can be shown in a message: in one line, printable, and cut where it is long."""
    text = str(name)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= length else f"{text[:length]}…"


def shorten(value: Any, length: int = 60) -> str:
    """The `repr` of a value from a file, cut where it is long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}…"
