# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The result file of a benchmark."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.failures import Failures, is_peer
from benchmarks.origin import PROJECT, environment


class Results:
    """The rows of a benchmark, and their file: it is written again after every row, so that none is lost.

    Args:
        path: the file; by default results/<benchmark>_<device>.json.
        benchmark: the benchmark's name.
        device: "cpu" or "cuda".
    """

    def __init__(self, path: Path | None, benchmark: str, device: str) -> None:
        self.path = path or PROJECT / "results" / f"{benchmark}_{device}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        self._head = {"benchmark": benchmark, "device": device, "environment": environment(device)}

    def add(self, row: dict[str, Any], failed: Failures, describe: Callable[[dict[str, Any]], str]) -> None:
        """Writes the row, with those that dropped out of it, and prints a line."""
        self.rows.append(row | ({"failed": failed} if failed else {}))
        self._write(complete=False)
        print(describe(row) + (f"  failed: {', '.join(failed)}" if failed else ""), flush=True)

    def finish(self) -> int:
        """Says that no row is missing; returns the exit status, 1 if anything failed that is not a peer."""
        self._write(complete=True)
        print(f"written: {self.path}")
        return int(any(not is_peer(name) for row in self.rows for name in row.get("failed", ())))

    def _write(self, complete: bool) -> None:
        text = json.dumps(self._head | {"complete": complete, "rows": self.rows}, indent=1)
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(f"{text}\n")
        os.replace(part, self.path)
