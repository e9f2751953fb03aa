# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Says on one screen what a run of dev/gpu_check.sh showed.

    python dev/gpu_report.py FOLDER     the unpacked gpu_check_MODE.tar.gz

Prints why stages failed, the prices, the kernels that take the time and what limits them, and what to look at next.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import goals, goals_cuda
from benchmarks.rows import PASSES, fastest

DTYPES = ("bfloat16", "float16", "tf32", "float32")
SHOWN_KERNELS = 9
TESTS = ("kernels:", "tests:", "determinism:")
SHOWN_FAILURES = 5
TO_MICROSECONDS = {"n": 1e-3, "u": 1.0, "m": 1e3, "s": 1e6}  # by a unit's first letter

Rows = list[dict[str, Any]]


def read_rows(path: Path) -> Rows:
    """The rows of a result file; none where it is missing or cut off."""
    try:
        return json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError):
        return []


def failures(folder: Path) -> Iterator[str]:
    """For every stage that failed, the lines of its output that say why."""
    verdicts = (folder / "verdicts.txt").read_text() if (folder / "verdicts.txt").exists() else ""
    for stage, reason in re.findall(r"^FAIL (\w+) \((.*)\)", verdicts, re.M):
        path = folder / f"{stage}.txt"
        lines = (
            [line for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.exists() else []
        )
        telling = [line for line in lines if re.match(r"(FAILED|ERROR) |\w*(Error|Exception)\b.*:|gpu_check: ", line)]
        chosen = telling[:SHOWN_FAILURES] or lines[-2:]
        more = f" (and {len(telling) - len(chosen)} more)" if len(telling) > len(chosen) else ""
        yield f"{stage}: {reason}{more}"
        yield from (f"  {line[:160]}" for line in chosen)


def price_table(folder: Path) -> Iterator[str]:
    """For each dtype and layer: microseconds of the plain convolution and of ours, and their quotient."""
    cells: dict[tuple[str, int], dict[tuple[str, str], str]] = {}
    for dtype in DTYPES:
        for row in read_rows(folder / f"deform_conv2d_cuda_{dtype}.json"):
            plain, ours = fastest(row, "conv"), fastest(row, "dcn_d2")
            if row.get("buffers", "hot") == "hot" and plain and ours:
                cell = f"{plain * 1e3:.0f}>{ours * 1e3:.0f} {ours / plain:.2f}"
                place = (row["shape"]["name"], row["shape"]["batch"])
                cells.setdefault(place, {})[dtype, row["pass"]] = cell
    if not cells:
        return
    columns = [(d, p) for d in DTYPES for p in PASSES if any((d, p) in found for found in cells.values())]
    yield "price, operands hot: microseconds of the plain convolution > of dcn_d2, and their quotient"
    yield " " * 8 + "".join(f"{dtype + (' fwd' if p == 'forward' else ' f+b'):>16s}" for dtype, p in columns)
    for (name, batch), found in sorted(cells.items(), key=lambda item: (item[0][1], item[0][0])):
        yield f"{name} N={batch:<3d}" + "".join(f"{found.get(column, '-'):>16s}" for column in columns)


def kernel_table(folder: Path) -> Iterator[str]:
    """The kernels of the largest batch of c3, forward and backward."""
    rows = [
        r for r in read_rows(folder / "profile_cuda.json") if r["contestant"] == "dcn_d2" and r["pass"] == PASSES[1]
    ]
    rows = [r for r in rows if r["shape"]["name"] == "c3"]
    if not rows:
        return
    row = max(rows, key=lambda r: r["shape"]["batch"])
    total = sum(kernel["microseconds"] for kernel in row["kernels"].values())
    yield f"kernels of c3 N={row['shape']['batch']} {row['dtype']} forward+backward: {total:.0f} us"
    for name, kernel in list(row["kernels"].items())[:SHOWN_KERNELS]:
        yield f"  {kernel['microseconds']:8.1f} us {kernel['launches']:4.1f} x  {name[:90]}"


def counters(path: Path) -> Iterator[dict[str, str]]:
    """For each kernel that Nsight Compute measured: its name, and the numbers of `counter_table`.

    The file has a line of names, a line of units, and a line for each launch.
    """
    if not path.exists():
        return
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.startswith('"')]
    names, units, *launches = [*csv.reader(lines)] or [[], []]
    for launch in launches:
        values = dict(zip(names, launch))
        unit = dict(zip(names, units)).get("gpu__time_duration.sum", "ns")
        found = {"kernel": values.get("Kernel Name", "?")}

        def largest(pattern: str, values: dict[str, str] = values) -> tuple[float, str]:
            hits = [(number(v), m[1] if m.groups() else k) for k, v in values.items() if (m := re.search(pattern, k))]
            return max(hits, default=(float("nan"), "?"))

        found["us"] = f"{number(values.get('gpu__time_duration.sum', 'nan')) * TO_MICROSECONDS[unit[0]]:.1f}"
        for label, pattern in (
            ("L1 hit", r"^l1tex__t_sector_hit_rate\.pct$"),
            ("L2 busy", r"^lts__t_(?:sectors|bytes).*pct_of_peak_sustained_elapsed$"),
            ("issue", r"^sm(?:sp)?__(?:inst_issued|issue_active)\..*pct"),
            ("tensor", r"^sm__(?:inst_executed_)?pipe_tensor.*pct_of_peak"),
            ("L1 busy", r"^l1tex__(?:data_pipe_lsu_wavefronts|throughput).*pct_of_peak"),
            ("regs", r"^launch__registers_per_thread$"),
        ):
            found[label] = f"{largest(pattern)[0]:.0f}"
        stall, reason = largest(r"issue_stalled_(\w+?)(?:_not_issued)?_per_(?:issue_active|warp_active)")
        found["stall"] = f"{reason} {stall:.1f}"
        yield found


def number(text: str) -> float:
    """A number as Nsight Compute prints it, with commas; NaN where it is none."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return float("nan")


def counter_table(folder: Path) -> Iterator[str]:
    """What limits the kernels that take longest, in per cent of what the GPU can do."""
    rows = sorted(counters(folder / "profile_counters.csv"), key=lambda row: -float(row["us"]))[:SHOWN_KERNELS]
    if rows:
        yield "counters (per cent; stall: the reason for which warps wait most, in warps at each issue)"
        labels = [label for label in rows[0] if label not in ("kernel", "stall")]
        yield "  " + "".join(f"{label:>9s}" for label in labels) + "  stall, kernel"
        for row in rows:
            yield "  " + "".join(f"{row[label]:>9s}" for label in labels) + f"  {row['stall']}, {row['kernel'][:60]}"


def next_steps(folder: Path, failed: bool) -> Iterator[str]:
    """What to look at first: what is wrong, then the goals that are missed by most."""
    if failed:
        yield "a test failed, see above: no time counts where a result is wrong"
    rows: dict[str, Rows] = {}
    for path in folder.glob("*_cuda*.json"):
        benchmark = path.name.partition("_cuda")[0]
        rows.setdefault(benchmark, []).extend(read_rows(path))
    missed = []
    answers = []
    for goal in goals_cuda.GOALS:
        if goal.benchmark in rows:
            answer, words = goals.verdict(goal, rows[goal.benchmark])
            answers.append(answer)
            if answer == "no":
                value = float(re.search(r"measured ([\d.]+)", words)[1])  # type: ignore[index]
                by = value / goal.at_most if goal.at_most < float("inf") else goal.at_least / max(value, 1e-9)
                missed.append((by, f"{goal.what}: {words}"))
    if answers:
        yield "goals: " + ", ".join(f"{answers.count(answer)} {answer}" for answer in ("yes", "no", "not measured"))
    for by, words in sorted(missed, reverse=True)[:SHOWN_FAILURES]:
        yield f"missed by {by:.1f} times: {words[:140]}"


def report(folder: Path) -> None:
    """Prints the report of a folder."""
    wrong = list(failures(folder))
    for title, lines in (
        ("why stages failed", wrong),
        ("", list(price_table(folder))),
        ("", list(kernel_table(folder))),
        ("", list(counter_table(folder))),
        ("look at first", list(next_steps(folder, any(line.startswith(TESTS) for line in wrong)))),
    ):
        if lines:
            print(*([f"-- {title}"] if title else []), *lines, sep="\n")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="gpu_report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the unpacked gpu_check_MODE.tar.gz")
    folder = parser.parse_args(arguments).folder
    if not folder.is_dir():
        parser.error(f"{folder} is not a folder; unpack gpu_check_MODE.tar.gz first")
    report(folder)


if __name__ == "__main__":
    main()
