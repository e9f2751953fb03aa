# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Says whether a short training run learned.

    python dev/losses.py OUTPUT_DIR/metrics.json

Fails if a loss is not finite, or if the mean of the last quarter is not below that of the first.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path


def judge(losses: list[float]) -> str:
    """Returns what is wrong, or ""."""
    if len(losses) < 4:
        return f"only {len(losses)} losses were written"
    if not all(map(math.isfinite, losses)):
        return f"losses are not finite: {losses}"
    quarter = len(losses) // 4
    first, last = statistics.mean(losses[:quarter]), statistics.mean(losses[-quarter:])
    return "" if last < first else f"the loss went from {first:.3f} to {last:.3f}"


def main(arguments: list[str] | None = None) -> None:
    """Reads the file that Detectron2 writes, a line of JSON every 20 iterations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="METRICS.JSON")
    path = parser.parse_args(arguments).path
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    losses = [row["total_loss"] for row in rows if "total_loss" in row]
    print("losses:", *(f"{loss:.3f}" for loss in losses))
    if wrong := judge(losses):
        sys.exit(f"losses: {wrong}")


if __name__ == "__main__":
    main()
