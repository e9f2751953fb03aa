# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Which goals a result file meets: `--check FILE` of every benchmark.

A contestant that a goal names without a memory format counts in the faster of the two. If a contestant dropped out of a
row, the goals that need it there are not measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import goals_cpu, goals_cuda
from benchmarks.goal import Goal
from benchmarks.rows import lowest, read

Documents = dict[Path, dict[str, Any]]


def report(paths: Iterable[Path]) -> str:
    """One line a goal: the verdict, the goal, and what was measured.

    Each file of a CPU is judged by itself. The files of a GPU are judged together, as each dtype has a file of its own.

    Raises:
        ValueError: one of the files is not a result file.
    """
    documents = {path: read(path) for path in paths}
    on_gpu = {path: document for path, document in documents.items() if document["device"] == "cuda"}
    parts = [_report({path: documents[path]}, goals_cpu.GOALS) for path in documents if path not in on_gpu]
    return "\n\n".join([*parts, *([_report(on_gpu, goals_cuda.GOALS)] if on_gpu else [])])


def _report(documents: Documents, goals: Sequence[Goal]) -> str:
    """The files by name, then one line a goal, judged by the rows of all these files.

    Raises:
        ValueError: something lacks in the files that the goals need.
    """
    try:
        return _judged(documents, goals)
    except KeyError as error:
        files = ", ".join(map(str, documents))
        message = f"{files} cannot be judged: a part of it has no {error}, as a benchmark's rows have"
        raise ValueError(message) from None


def _judged(documents: Documents, goals: Sequence[Goal]) -> str:
    found: dict[str, list[dict[str, Any]]] = {}
    for document in documents.values():
        found.setdefault(document["benchmark"], []).extend(document["rows"])
    titles = [_title(path, document) for path, document in documents.items()]
    wanted = [goal for goal in goals if goal.benchmark in found]
    if not wanted:
        device = next(iter(documents.values()))["device"]
        return "\n".join([*titles, f"no goals for {', '.join(found)} on {device}"])
    return "\n".join([*titles, *judge(wanted, [found[goal.benchmark] for goal in wanted])])


def _title(path: Path, document: dict[str, Any]) -> str:
    """One line: where a result file comes from, and whether its benchmark was cut off."""
    environment = document["environment"]
    cut_off = "" if document.get("complete", True) else ", not complete"
    return f"{path.name}: {environment['device']}, commit {environment['commit']}, {environment['date']}{cut_off}"


def judge(goals: Sequence[Goal], rows: Sequence[list[dict[str, Any]]]) -> list[str]:
    """A line for each goal, judged by its rows, and a last one that counts."""
    verdicts = [verdict(goal, each) for goal, each in zip(goals, rows)]
    lines = [f"{answer:12s} {goal.what}: {words}" for goal, (answer, words) in zip(goals, verdicts)]
    answers = [answer for answer, _ in verdicts]
    return [*lines, ", ".join(f"{answers.count(answer)} {answer}" for answer in ("yes", "no", "not measured"))]


def verdict(goal: Goal, rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Returns "yes", "no" or "not measured", and the numbers in words."""
    values = measured(goal, rows)
    bound = f"at most {goal.at_most:g}" if goal.at_most < math.inf else f"at least {goal.at_least:g}"
    failures = _failures(goal, rows)
    if failures:
        return "not measured", f"{bound}; failed: {', '.join(failures)}"
    if not values:
        return "not measured", bound
    if goal.mean:
        value = math.exp(sum(map(math.log, values.values())) / len(values))
        place = ", ".join(f"{name} {v:.3g}" for name, v in values.items())
    else:
        worst = max if goal.at_most < math.inf else min
        name, value = worst(values.items(), key=lambda item: item[1])
        place = f"{name} of {', '.join(values)}" if len(values) > 1 else name
    return ("yes" if goal.at_least <= value <= goal.at_most else "no"), f"{bound}, measured {value:.3f} ({place})"


def measured(goal: Goal, rows: list[dict[str, Any]]) -> dict[str, float]:
    """The quotient in every row that the goal is about, by the name of the shape."""
    if not goal.scaling:
        return _quotients(goal, rows, goal.where)
    one = _quotients(goal, rows, goal.where)
    all_threads = _quotients(goal, rows, goal.where | {"threads": "all"})
    return {name: one[name] / value for name, value in all_threads.items() if name in one}


def _quotients(goal: Goal, rows: list[dict[str, Any]], where: dict[str, Any]) -> dict[str, float]:
    where = dict(where)
    if where.get("threads") == "all":
        where["threads"] = max((row["threads"] for row in rows), default=1)
        if where["threads"] == 1:
            return {}
    found = {}
    for row in rows:
        of_row = row["peak_extra_mib" if "peak_extra_mib" in row else "milliseconds"]
        costs = [lowest(of_row, name) for name in goal.quotient]
        if _selects(where, row) and None not in costs:
            numerator, denominator = (max(cost or 0.0, 1e-6) for cost in costs)  # extra memory may be none at all
            found[_place(where, row)] = numerator / denominator
    return found


def _failures(goal: Goal, rows: list[dict[str, Any]]) -> list[str]:
    """Which of the goal's contestants dropped out of its rows, and where; a peer's name means all its contestants."""
    where = {key: value for key, value in goal.where.items() if value != "all"}
    found = []
    for row in rows:
        for failed in row.get("failed", ()) if _selects(where, row) else ():
            concerned = any(f"{a} ".startswith(f"{b} ") for c in goal.quotient for a, b in ((c, failed), (failed, c)))
            if concerned or failed in ("operands", "models", "reference"):
                found.append(f"{failed} at {_place(where, row)}")
    return found


def _place(where: dict[str, Any], row: dict[str, Any]) -> str:
    """A row's name, with its values of those keys for which the goal accepts several."""
    says = row["shape"] | row
    several = [f"{key} {says[key]}" for key, value in where.items() if isinstance(value, tuple)]
    return " ".join([row["shape"]["name"], *several])


def _selects(where: dict[str, Any], row: dict[str, Any]) -> bool:
    says = row["shape"] | row
    return all(
        key in says and (says[key] in value if isinstance(value, tuple) else says[key] == value)
        for key, value in where.items()
    )
