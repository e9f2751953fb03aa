# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What an inspection of data gives: findings with counts and places, numbers about the data, and pictures."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..findings import Fault, Findings

SEVERITIES = ("error", "warning", "information")
_WIDTH = 118


@dataclasses.dataclass(frozen=True)
class Finding:
    """One kind of fault, or of what is good to know, of one data set.

    Attributes:
        kind: a short name that stays the same, such as "box-flat" or "image-missing".
        severity: "error" (a training would fail or be wrong), "warning" or "information".
        data_set: which one.
        what: the fault in words.
        count: how many images, annotations or categories have it; 1 for a fault of the data set as a whole.
        total: how many there are; 0 for a fault of the data set as a whole.
        examples: the first places.
        advice: what it means and the way out; may be "".
    """

    kind: str
    severity: str
    data_set: str
    what: str
    count: int
    total: int
    examples: tuple[str, ...] = ()
    advice: str = ""

    @classmethod
    def of(cls, fault: Fault, data_set: str) -> Finding:
        """Makes one of what a check has noted."""
        count, total = (len(fault.where), len(fault.things)) if fault.things else (1, 0)
        places = tuple(fault.examples)
        return cls(fault.kind, fault.severity, data_set, fault.what, count, total, places, fault.then)

    def __str__(self) -> str:
        number = f"{self.count} of {self.total} " if self.total else ""
        more = f"; and {self.count - len(self.examples)} more" if self.count > len(self.examples) else ""
        places = f": {'; '.join(self.examples)}{more}" if self.examples else ""
        return f"{number}{self.what}{places}{f'. {self.advice}' if self.advice else ''}"


@dataclasses.dataclass
class Report:
    """The result of `dcn_d2.data.check`; ``print(report)`` shows it as text.

    Attributes:
        findings: all findings, errors first.
        statistics: for each data set numbers about it, ready for JSON.
        pictures: files with annotated samples, if they were asked for.
    """

    findings: list[Finding] = dataclasses.field(default_factory=list)
    statistics: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    pictures: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if there are no errors."""
        return not self.select("error")

    def select(self, severity: str) -> list[Finding]:
        """The findings of one severity."""
        return [finding for finding in self.findings if finding.severity == severity]

    def take(self, findings: Findings, data_set: str) -> None:
        """Takes over what a check has noted about a data set."""
        counted = {fault.line for fault in findings.faults}
        for severity, lines in (("error", findings.errors), ("warning", findings.warnings)):
            for line in lines:
                if line not in counted:  # only `needs` notes lines by themselves
                    self.findings.append(Finding("classes", severity, data_set, line, 1, 0))
        self.findings.extend(Finding.of(fault, data_set) for fault in findings.faults)
        self.findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))  # stable

    def __str__(self) -> str:
        lines = []
        for name, numbers in self.statistics.items():
            lines += [f"data set {name}", *_table(numbers), ""]
        for finding in self.findings:
            head = f"{finding.severity:<12}{finding.data_set}: {finding.kind}"
            lines += [head, *_wrap(str(finding), " " * 4)]
        counts = (f"{severity}: {len(self.select(severity))}" for severity in SEVERITIES)
        lines.append("nothing found" if not self.findings else f"kinds of findings: {', '.join(counts)}")
        return "\n".join([*lines, *(f"picture of samples: {path}" for path in self.pictures)])

    def write(self, folder: Path) -> None:
        """Writes report.txt and report.json into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.txt").write_text(f"{self}\n")
        (folder / "report.json").write_text(json.dumps(dataclasses.asdict(self) | {"ok": self.ok}, indent=1))


def _table(numbers: dict[str, Any]) -> Iterable[str]:
    for key, value in numbers.items():
        text = ", ".join(f"{name} {part}" for name, part in value.items()) if isinstance(value, dict) else str(value)
        yield from _wrap(f"{key}: {text}", " " * 8)


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=" " * 4,
        subsequent_indent=indent,
        break_long_words=False,  # paths must stay whole
        break_on_hyphens=False,
    )
