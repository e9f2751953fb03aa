# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The goals of the CPU operators as data, and which of them a result file meets: `--check FILE` of every benchmark.

Those of the CUDA operators are in goals_cuda.py.

A price is a time over that of the plain contestant of the same shape, number of threads and memory format; a speed is
a peer's time over ours. Contestants named without a memory format stand in the faster of the two. If a contestant
dropped out of a row, the goals that need it there are not measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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


PLAIN: dict[str, Any] = {"batch": 1, "stride": 1, "groups": 1, "deform_groups": 1, "mask": True}
ONE = {"threads": 1, "dtype": "float32"}
FORMATS = ("NHWC", "NCHW")
PASSES = ("forward", "forward+backward")


def _each_and_mean(
    what: str, quotient: tuple[str, str], where: dict[str, Any], benchmark: str = "deform_conv2d", **bounds: Any
) -> list[Goal]:
    """Two goals from bounds that are pairs: for each row, and for the geometric mean."""
    each = {name: pair[0] for name, pair in bounds.items()}
    mean = {name: pair[1] for name, pair in bounds.items()}
    return [
        Goal(f"{what}, each", benchmark, quotient, where=where, **each),
        Goal(f"{what}, geometric mean", benchmark, quotient, where=where, mean=True, **mean),
    ]


def _convolution() -> list[Goal]:
    forward = ONE | PLAIN | {"pass": "forward"}
    both = ONE | PLAIN | {"pass": "forward+backward"}
    grouped = forward | {"groups": 32}
    last, first = ("dcn_d2 NHWC", "conv NHWC"), ("dcn_d2 NCHW", "conv NCHW")
    over_torchvision = ("torchvision", "dcn_d2")
    found = [
        *_each_and_mean("forward price, channels_last, 1 thread", last, forward, at_most=(1.15, 1.10)),
        *_each_and_mean("forward price, NCHW, 1 thread", first, forward, at_most=(1.20, 1.12)),
        *_each_and_mean("forward+backward price, channels_last, 1 thread", last, both, at_most=(1.30, 1.20)),
        *_each_and_mean("forward over torchvision, 1 thread", over_torchvision, forward, at_least=(3.2, 6.0)),
        *_each_and_mean("forward+backward over torchvision, 1 thread", over_torchvision, both, at_least=(7.0, 16.0)),
    ]
    for dtype in ("bfloat16", "float16"):
        where = forward | {"dtype": dtype}
        found.append(Goal(f"{dtype} forward price, 1 thread", "deform_conv2d", ("dcn_d2", "conv"), 1.0, where=where))
    for threads, words in ((1, "1 thread"), ("all", "all threads")):
        where = forward | {"threads": threads}
        what = f"forward over ONNX Runtime, {words}"
        found += _each_and_mean(what, ("onnxruntime", "dcn_d2"), where, at_least=(1.4, 1.8))
    for layout, quotient in zip(FORMATS, (last, first)):
        what = f"groups=32: forward price, {layout}, 1 thread"
        found.append(Goal(what, "deform_conv2d", quotient, at_most=2.5, where=grouped))
    what = "groups=32: forward over torchvision, 1 thread"
    found.append(Goal(what, "deform_conv2d", over_torchvision, at_least=20.0, where=grouped))
    for direction in PASSES:
        for layout, quotient in zip(FORMATS, (last, first)):
            what = f"{direction}, {layout}: gain from all threads over the plain convolution's"
            where = forward | {"pass": direction}
            found.append(Goal(what, "deform_conv2d", quotient, at_least=0.95, where=where, scaling=True))
    for direction, bound in zip(PASSES, (1.0, 1.2)):
        for layout, quotient in zip(FORMATS, (last, first)):
            what = f"{direction}, {layout}: extra memory over the plain convolution's"
            where = PLAIN | {"pass": direction}
            found.append(Goal(what, "deform_conv2d_memory", quotient, at_most=bound, where=where))
    return found


def _roi_pooling() -> list[Goal]:
    """For the modulated operator, which has the most to do; `roi_align` always is the plain one."""
    found = []
    sizes = ONE | {"rois": 512, "channels": 256, "bins": 7}
    for sampling in (2, 4):
        for layout, bound in zip(FORMATS, (12.0, 8.0)):
            what = f"deform_roi_pool forward over roi_align, {layout}, sampling {sampling}, 1 thread"
            where = sizes | {"sampling": sampling, "pass": "forward"}
            quotient = ("roi_align", f"modulated {layout}")
            found += _each_and_mean(what, quotient, where, "deform_roi_pool", at_least=(bound, bound))
        what = f"deform_roi_pool forward+backward over roi_align, sampling {sampling}, 1 thread"
        where = sizes | {"sampling": sampling, "pass": "forward+backward"}
        found += _each_and_mean(what, ("roi_align", "modulated"), where, "deform_roi_pool", at_least=(8.0, 8.0))
    return found


def _detectors() -> list[Goal]:
    return [
        Goal(
            f"{words}, mdconv c3-c5 over plain, {layout}, 1 thread",
            "detector",
            (f"dcn_d2 {layout}", f"plain {layout}"),
            at_most=bound,
            where=ONE | {"pass": part, "height": 800, "width": 1216},
        )
        for part, words, bound in (("trunk", "R-50 trunk", 1.08), ("inference", "whole Faster R-CNN, inference", 1.06))
        for layout in FORMATS
    ]


GOALS = [*_convolution(), *_roi_pooling(), *_detectors()]


def report(paths: Iterable[Path]) -> str:
    """One line a goal for each file: the verdict, the goal, and what was measured. GPU files are judged together."""
    import goals_cuda  # which imports this file

    paths = list(paths)
    on_gpu = [path for path in paths if json.loads(path.read_text())["device"] == "cuda"]
    parts = [_report_file(path) for path in paths if path not in on_gpu]
    return "\n\n".join([*parts, *([goals_cuda.report(on_gpu)] if on_gpu else [])])


def _report_file(path: Path) -> str:
    document = json.loads(path.read_text())
    lines = [title(path, document)]
    wanted = [goal for goal in GOALS if goal.benchmark == document["benchmark"]]
    if not wanted:
        return f"{lines[0]}\nno goals for {document['benchmark']} on {document['device']}"
    return "\n".join([*lines, *judge(wanted, [document["rows"]] * len(wanted))])


def title(path: Path, document: dict[str, Any]) -> str:
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
        costs = [_cost(row, name) for name in goal.quotient]
        if _selects(where, row) and None not in costs:
            numerator, denominator = (max(cost, 1e-6) for cost in costs)  # extra memory may be none at all
            found[_place(where, row)] = numerator / denominator
    return found


def _failures(goal: Goal, rows: list[dict[str, Any]]) -> list[str]:
    """Who of the goal's contestants dropped out of its rows, and where; the name of a peer stands for all of its."""
    where = {key: value for key, value in goal.where.items() if value != "all"}
    found = []
    for row in rows:
        for failed in row.get("failed", ()) if _selects(where, row) else ():
            concerned = any(f"{a} ".startswith(f"{b} ") for c in goal.quotient for a, b in ((c, failed), (failed, c)))
            if concerned or failed in ("operands", "models", "reference"):
                found.append(f"{failed} at {_place(where, row)}")
    return found


def _place(where: dict[str, Any], row: dict[str, Any]) -> str:
    """A row's name, with what it says about that of which the goal wants several."""
    says = row["shape"] | row
    several = [f"{key} {says[key]}" for key, value in where.items() if isinstance(value, tuple)]
    return " ".join([row["shape"]["name"], *several])


def _selects(where: dict[str, Any], row: dict[str, Any]) -> bool:
    says = row["shape"] | row
    return all(
        key in says and (says[key] in value if isinstance(value, tuple) else says[key] == value)
        for key, value in where.items()
    )


def _cost(row: dict[str, Any], name: str) -> Any:
    """Milliseconds or mebibytes of a contestant in one memory format, or else in the faster of those that it has."""
    costs = row["peak_extra_mib"] if "peak_extra_mib" in row else row["milliseconds"]
    values = [value for contestant, value in costs.items() if f"{contestant} ".startswith(f"{name} ")]
    return min((value["median"] if isinstance(value, dict) else value for value in values), default=None)
