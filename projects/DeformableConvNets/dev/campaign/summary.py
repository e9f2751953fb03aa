# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Summarises the results of all stages of dev/campaign.sh in one file, and on one screen.

python dev/campaign/summary.py FOLDER --size full --seed 0 --output results/campaign.json --stages operators kills
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(PROJECT))

# The names that stages give to their findings, and to the text of a finding.
FOUND = ("findings", "mismatches", "faults", "failures")
TEXTS = ("what", "found", "message")
SANITIZED = "dev/sanitize.sh --run"
NOT_HERE = 77  # exit status of a stage that cannot run here
SHOWN = 10  # findings of a stage on the screen; the file has all
SHOWN_LINES = 5  # the last lines that a stage has printed


def read_stage(folder: Path, name: str) -> dict[str, Any]:
    """Gives what a stage did: command, status, seconds, cases, findings."""
    command = _read(folder / f"{name}.command").strip().replace(sys.executable, "python")
    status_line = _read(folder / f"{name}.status").split()
    status, seconds, limit = (int(word) for word in status_line) if len(status_line) == 3 else (None, 0, 0)
    stage: dict[str, Any] = {"command": command, "status": status, "seconds": seconds, "cases": 0}
    log = [line for line in _read(folder / f"{name}.txt").splitlines() if line.strip()]
    if status == NOT_HERE:
        return stage | {"skipped": log[-1] if log else "it cannot run here", "findings": []}
    text = _read(folder / f"{name}.json")
    findings: list[dict[str, str]] = []
    try:
        result = json.loads(text)
        counted = {**result, **result.get("counts", {})}
        stage["cases"] = counted["cases"] if "cases" in counted else counted["kills"]
        stage = {key: value for key, value in result.items() if key not in (*FOUND, "kills")} | stage
        key = next((key for key in FOUND if key in result), FOUND[0])
        findings = [_as_finding(finding, command) for finding in result[key]]
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        what = "it left no result" if not text else f"its result cannot be read: {type(error).__name__}: {error}"
        findings = [{"what": f"{what}; {_describe_end(status, limit)}", "replay": command}]
        findings[0]["printed"] = "\n".join(log[-SHOWN_LINES:])
    if status != 0 and not findings:
        printed = "\n".join(log[-SHOWN_LINES:])
        findings = [
            {"what": f"it found nothing, but {_describe_end(status, limit)}", "replay": command, "printed": printed}
        ]
    return stage | {"findings": findings}


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _as_finding(finding: Any, command: str) -> dict[str, Any]:
    """A finding with the fields `what` and `replay`, the command that shows it again.

    One that knows only the number of its case is shown again by that; one that knows nothing, by the whole stage.
    """
    if not isinstance(finding, dict):
        finding = {"what": str(finding)}
    what = next((finding[key] for key in TEXTS if key in finding), json.dumps(finding, default=str))
    stage = command.partition(" --cases ")[0]
    again = f"{stage} --replay {finding['case']}" if isinstance(finding.get("case"), int) else command
    replay = finding.get("replay", again)
    if command.startswith(SANITIZED) and not replay.startswith(SANITIZED):
        replay = f"{SANITIZED} {replay}"
    return finding | {"what": "; ".join(what) if isinstance(what, list) else str(what), "replay": replay}


def _describe_end(status: int | None, limit: int) -> str:
    if status is None:
        return "it did not end"
    if status in (124, 137):
        return f"it was stopped after {limit} seconds"
    if status > 128:
        return f"it was ended by {signal.Signals(status - 128).name}"
    return f"it ended with exit status {status}"


def lines(stages: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each stage, and two for each finding."""
    for name, stage in stages.items():
        found = len(stage["findings"])
        verdict = "SKIP" if "skipped" in stage else "FAIL" if found else "PASS"
        what = stage["skipped"] if "skipped" in stage else f"{stage['cases']} cases, {found} findings"
        yield f"{verdict} {name}: {what}, {stage['seconds']} s"
        for finding in stage["findings"][:SHOWN]:
            yield f"  {finding['what']}"
            yield from (f"  | {line}" for line in finding.get("printed", "").splitlines())
            yield f"    again: {finding['replay']}"
        if found > SHOWN:
            yield f"  and {found - SHOWN} more, see the file"


def main(argv: list[str] | None = None) -> int:
    """Writes the file; returns 1 if anything was found or nothing was tried."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the stages left their files")
    parser.add_argument("--size", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", required=True)
    args = parser.parse_args(argv)
    from benchmarks.origin import environment  # imports torch

    stages = {name: read_stage(args.folder, name) for name in args.stages}
    found = sum(len(stage["findings"]) for stage in stages.values())
    summary = {
        "environment": environment("cpu"),
        "size": args.size,
        "seed": args.seed,
        "findings": found,
        "stages": stages,
    }
    part = args.output.with_name(f".{args.output.name}.part")
    # The command must also work elsewhere, so it must not contain paths of this machine.
    text = json.dumps(summary, indent=1, default=str).replace(sys.executable, "python").replace(f"{PROJECT}/", "")
    text = text.replace(f"{tempfile.gettempdir()}/", "TMPDIR/")
    part.write_text(text + "\n")
    os.replace(part, args.output)
    print(*lines(stages), f"summary: {args.output}", sep="\n")
    return int(found > 0 or all("skipped" in stage for stage in stages.values()))


if __name__ == "__main__":
    sys.exit(main())
