# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""How to read the rows of a result file, and how to write their numbers in words. Imports no torch.

A contestant's name is its implementation and, where it takes part in both, its memory format: "dcn_d2 NHWC".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PASSES = ("forward", "forward+backward")
BUFFERS = ("hot", "rotated")  # states of a GPU's caches


def read(path: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        ValueError: the file cannot be read, or no benchmark has written it.
    """
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a result file: it holds no JSON ({error})") from error
    kinds = {"benchmark": str, "device": str, "environment": dict, "rows": list}
    missing = [key for key in kinds if not isinstance(document, dict) or key not in document]
    if missing:
        raise ValueError(f"{path} is not a result file: it has no {', '.join(missing)}")
    wrong = [key for key, kind in kinds.items() if not isinstance(document[key], kind)]
    if wrong or not all(isinstance(row, dict) for row in document["rows"]):
        raise ValueError(f"{path} is not a result file: it has no usable {', '.join(wrong or ['rows'])}")
    return document


def lowest(costs: dict[str, Any], name: str) -> float | None:
    """The lowest cost of a contestant. A name without a memory format means the better one of the two.

    Args:
        costs: "milliseconds" of a row, of which the median counts, or its "peak_extra_mib".
        name: the first words of the contestant's name.

    Returns:
        The cost, or None if the contestant took no part.
    """
    found = [cost for contestant, cost in costs.items() if f"{contestant} ".startswith(f"{name} ")]
    return min((cost["median"] if isinstance(cost, dict) else cost for cost in found), default=None)


def fastest(row: dict[str, Any], name: str) -> float | None:
    """The median milliseconds of a contestant in its faster memory format, or None if it took no part."""
    return lowest(row["milliseconds"], name)


def duration(milliseconds: float | None) -> str:
    """A time in words, with three significant digits."""
    if milliseconds is None:
        return "-"
    value, unit = (milliseconds, "ms") if milliseconds >= 1 else (milliseconds * 1e3, "us")
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def quotient(numerator: float | None, denominator: float | None, digits: int = 2) -> str:
    """The quotient of two times in words."""
    return f"{numerator / denominator:.{digits}f}" if numerator and denominator else "-"
