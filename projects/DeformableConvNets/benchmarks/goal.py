# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What a goal is. goals_cpu.py and goals_cuda.py list the goals, goals.py judges them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Goal:
    """A bound on a quotient of two contestants, for all rows of a benchmark that `where` selects.

    Args:
        what: the goal in words.
        benchmark: whose result files it is about.
        quotient: names of two contestants, the first one's cost is divided by the second's.
        at_most: the quotient should not be above this; or
        at_least: the quotient should not be below this.
        where: what a row must say. The keys "pass", "threads", "dtype" and "buffers" belong to the row, all others to
            its shape. The value "all" for threads means the largest number in the file, if that is above 1. A tuple
            means any of its values.
        mean: the bound is for the geometric mean of the rows, not for each of them.
        scaling: the quotient with one thread is divided by the quotient with all threads. The result says how much of
            the second contestant's gain from threads the first one has too.
    """

    what: str
    benchmark: str
    quotient: tuple[str, str]
    at_most: float = math.inf
    at_least: float = 0.0
    where: dict[str, Any] = field(default_factory=dict)
    mean: bool = False
    scaling: bool = False
