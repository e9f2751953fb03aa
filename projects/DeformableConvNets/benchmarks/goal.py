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
        at_least: not below this.
        where: what a row must say; keys other than "pass", "threads", "dtype" and "buffers" are those of its shape. The
            value "all" for threads is the largest number in the file, and above 1; a tuple is any of its values.
        mean: the bound is for the geometric mean of the rows, not for each of them.
        scaling: the quotient with one thread is divided by that with all threads: how much of the gain from threads
            that the second contestant has the first one has too.
    """

    what: str
    benchmark: str
    quotient: tuple[str, str]
    at_most: float = math.inf
    at_least: float = 0.0
    where: dict[str, Any] = field(default_factory=dict)
    mean: bool = False
    scaling: bool = False
