# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""dev/campaign.sh with stand-ins for its stages: what runs with which arguments, and what the summary makes of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dev.campaign import summary

STAGES = ["operators", "sanitized", "checkpoints", "kills", "configs"]
# A stage. MODE_<its name> says how it goes: with findings, without a result, by a signal, for ever, or well.
STAND_IN = """
import json, os, signal, sys, time
*arguments, _, output = sys.argv[1:]
name = os.path.basename(sys.argv[0])[:-3]
with open(os.environ["LOG"], "a") as log:
    print("sanitized" if "DCN_LIBRARY" in os.environ else name, os.environ["OMP_NUM_THREADS"], *arguments, file=log)
mode = os.environ.get("MODE_" + name, "")
if mode == "dies":
    print("ERROR: AddressSanitizer: heap-buffer-overflow", flush=True)
    os.kill(os.getpid(), signal.SIGABRT)
if mode == "lasts":
    with open(os.environ["LOG"] + ".lasts", "a") as log:
        print(os.getpid(), file=log)
    time.sleep(60)
if mode == "cannot":
    print("the compiler has no sanitizers")
    sys.exit(77)
found = [{"what": "max difference 3.5", "replay": "dev/campaign/operators.py --seed 7 --case 12"}, "odd"]
findings = found if mode == "finds" else []
if mode != "forgets":
    json.dump({"kills" if name == "kills" else "cases": 40, "findings": findings, "slowest": 1.5}, open(output, "w"))
sys.exit(3 if mode in ("fails", "forgets") else len(findings) > 0)
"""
SANITIZE = '#!/bin/sh\n[ "$1" = --run ] || exit 9\nshift\nDCN_LIBRARY=x exec "$@"\n'


@pytest.fixture
def tree(project: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "tree/projects/DeformableConvNets"
    (copy / "dev/campaign").mkdir(parents=True)
    (copy / "results").mkdir()
    (copy / "benchmarks").mkdir()  # a stand-in too: the right one imports torch
    (copy / "benchmarks/origin.py").write_text("def environment(device): return {'device': device}")
    shutil.copy(project / "dev/campaign.sh", copy / "dev")
    shutil.copy(project / "dev/campaign/summary.py", copy / "dev/campaign")
    for name in STAGES:
        if name != "sanitized":
            (copy / f"dev/campaign/{name}.py").write_text(STAND_IN)
    (copy / "dev/sanitize.sh").write_text(SANITIZE)
    (copy / "dev/sanitize.sh").chmod(0o755)
    return copy


def environment(tree: Path, **variables: str) -> dict[str, str]:
    left_out = ("RESULTS", "SEED", "JOBS", "DCN_LIBRARY")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    kept |= {"PYTHON": sys.executable, "LOG": str(tree.parents[2] / "log")}
    return kept | {"GIT_CEILING_DIRECTORIES": str(tree.parents[2])} | variables


class Run:
    """One run of the script and what it left."""

    def __init__(self, tree: Path, *arguments: str, **variables: str) -> None:
        command = ["bash", str(tree / "dev/campaign.sh"), *arguments]
        done = subprocess.run(command, env=environment(tree, **variables), capture_output=True, text=True)
        self.status, self.output, self.errors = done.returncode, done.stdout, done.stderr
        log = tree.parents[2] / "log"
        self.calls = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        results, other = tree / "results/campaign.json", tree / "build/campaign/campaign.json"
        self.path = next((path for path in (results, other) if path.exists()), None)
        self.summary: dict[str, Any] = json.loads(self.path.read_text()) if self.path else {}

    def verdicts(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith(("PASS ", "FAIL ", "SKIP "))]


def test_all_stages_run_at_full_size_and_leave_one_summary(tree: Path, project: Path) -> None:
    shutil.copy(project / "benchmarks/origin.py", tree / "benchmarks")
    shutil.copytree(project / "dcn_d2", tree / "dcn_d2", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    run = Run(tree, SEED="5")
    assert run.status == 0, run.output + run.errors
    assert {call[0]: call[1:] for call in run.calls} == {
        "operators": ["1", "--seed", "5", "--cases", "45000"],
        "sanitized": ["1", "--seed", "5", "--cases", "5000"],
        "checkpoints": ["1", "--seed", "5", "--cases", "20000"],
        "kills": ["1", "--seed", "5", "--kills", "100"],
        "configs": ["1", "--seed", "5", "--cases", "0"],
    }
    assert run.path == tree / "results/campaign.json"
    assert run.summary["findings"] == 0 and run.summary["seed"] == 5 and run.summary["size"] == "full"
    assert {"commit", "device", "versions"} <= run.summary["environment"].keys()
    assert list(run.summary["stages"]) == STAGES
    assert run.summary["stages"]["configs"]["command"] == "python dev/campaign/configs.py --seed 5 --cases 0"
    for stage in run.summary["stages"].values():
        assert stage["cases"] == 40 and stage["slowest"] == 1.5 and stage["status"] == 0
    assert [line.split()[0] for line in run.verdicts()] == ["PASS"] * 5


def test_the_small_size_compiles_nothing_and_leaves_the_results_alone(tree: Path) -> None:
    run = Run(tree, "small")
    assert run.status == 0 and "sanitized" not in {call[0] for call in run.calls} and len(run.calls) == 4
    assert all(int(call[-1]) <= 400 for call in run.calls)
    assert run.path == tree / "build/campaign/campaign.json"


def test_a_stage_alone_can_write_where_it_is_told(tree: Path, tmp_path: Path) -> None:
    run = Run(tree, "kills", RESULTS=str(tmp_path / "mine.json"))
    assert run.status == 0 and [call[0] for call in run.calls] == ["kills"]
    assert list(json.loads((tmp_path / "mine.json").read_text())["stages"]) == ["kills"]
    assert run.path is None


def test_findings_have_a_line_that_shows_them_again(tree: Path) -> None:
    run = Run(tree, "small", "operators", "configs", MODE_operators="finds")
    assert run.status == 1 and run.summary["findings"] == 2
    assert run.verdicts()[0].startswith("FAIL operators: 40 cases, 2 findings")
    assert run.verdicts()[1].startswith("PASS configs")
    assert "  max difference 3.5\n    again: dev/campaign/operators.py --seed 7 --case 12" in run.output
    # One that does not say how: the whole stage.
    assert "  odd\n    again: python dev/campaign/operators.py --seed 0 --cases 400" in run.output


@pytest.mark.parametrize(
    ("mode", "what"),
    [
        ("dies", "it left no result; it was ended by SIGABRT"),
        ("forgets", "it left no result; it ended with exit status 3"),
        ("fails", "it found nothing, but it ended with exit status 3"),
    ],
)
def test_a_stage_that_breaks_is_a_finding(tree: Path, mode: str, what: str) -> None:
    run = Run(tree, "small", "sanitized", MODE_operators=mode)
    assert run.status == 1 and what in run.output, run.output
    assert "again: dev/sanitize.sh --run " in run.output
    assert ("  | ERROR: AddressSanitizer: heap-buffer-overflow" in run.output) == (mode == "dies")


def test_a_missing_stage_is_a_finding(tree: Path) -> None:
    (tree / "dev/campaign/kills.py").unlink()
    run = Run(tree, "small", "kills")
    assert run.status == 1 and "it left no result" in run.output and "No such file" in run.output


def test_what_cannot_run_here_is_skipped_and_nothing_tried_is_no_success(tree: Path) -> None:
    run = Run(tree, "small", "sanitized", "configs", MODE_operators="cannot")
    assert run.status == 0 and run.verdicts()[0].startswith("SKIP sanitized: the compiler has no sanitizers")
    assert Run(tree, "small", "sanitized", MODE_operators="cannot").status == 1


def test_stopped_by_a_signal_it_ends_its_stages_and_tells_what_was_found(tree: Path) -> None:
    command = ["bash", str(tree / "dev/campaign.sh"), "small"]
    stages = environment(tree, MODE_kills="lasts", MODE_configs="lasts", MODE_operators="finds", JOBS="2")
    begin = time.monotonic()
    with subprocess.Popen(command, env=stages, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        log = tree.parents[2] / "log.lasts"
        while not (log.exists() and len(log.read_text().split()) == 2) and time.monotonic() < begin + 30:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=50)
    assert process.returncode == 1 and "stopped; what was found so far" in errors
    assert "max difference 3.5" in output and "it was ended by SIGTERM" in output
    assert time.monotonic() < begin + 50
    for number in log.read_text().split():
        assert not Path("/proc", number).exists()


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["tests"], {}, "unknown stage 'tests'; there are operators"),
        (["operators", "small"], {}, "unknown stage 'small'"),
        (["small"], {"SEED": "one"}, "SEED must be a whole number, got 'one'"),
        (["small"], {"JOBS": "0"}, "JOBS must be at least 1"),
        (["small"], {"PYTHON": "nowhere/python"}, "no Python was found"),
    ],
)
def test_what_it_cannot_run_is_refused(
    tree: Path, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    run = Run(tree, *arguments, **variables)
    assert run.status == 2 and message in run.errors and not run.calls and run.path is None


def test_help_names_sizes_and_stages(tree: Path) -> None:
    run = Run(tree, "--help")
    assert run.status == 0 and "dev/campaign.sh small" in run.output and "set -uo" not in run.output
    assert all(stage in run.output for stage in STAGES)


@pytest.mark.parametrize(
    ("stage", "command", "result", "what", "replay"),
    [
        (
            "checkpoints",
            "python dev/campaign/checkpoints.py --seed 3 --cases 9",
            {"findings": [{"case": 7, "what": "it took 12 seconds"}]},
            "it took 12 seconds",
            "python dev/campaign/checkpoints.py --seed 3 --replay 7",
        ),
        (
            "sanitized",
            "dev/sanitize.sh --run python dev/campaign/operators.py --seed 3 --cases 9",
            {"mismatches": [{"found": ["max 3", "min 2"], "replay": "python dev/campaign/operators.py --replay 5"}]},
            "max 3; min 2",
            "dev/sanitize.sh --run python dev/campaign/operators.py --replay 5",
        ),
        (
            "configs",
            "python dev/campaign/configs.py --seed 3 --cases 0",
            {"faults": [{"key": "SEED", "message": "not named"}]},
            "not named",
            "python dev/campaign/configs.py --seed 3 --cases 0",
        ),
    ],
)
def test_each_stage_says_in_its_own_way_what_it_found(
    tmp_path: Path, stage: str, command: str, result: dict, what: str, replay: str
) -> None:
    (tmp_path / f"{stage}.status").write_text("1 3 600\n")
    (tmp_path / f"{stage}.command").write_text(command)
    (tmp_path / f"{stage}.json").write_text(json.dumps({"cases": 9} | result))
    read = summary.read_stage(tmp_path, stage)
    assert [(finding["what"], finding["replay"]) for finding in read["findings"]] == [(what, replay)]
    assert not {"mismatches", "faults"} & read.keys()


def test_a_result_that_is_cut_off_or_odd_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "kills.status").write_text("0 3 600\n")
    (tmp_path / "kills.command").write_text("python kills.py --kills 2 ")
    for text in ('{"kills": 2, "fin', "[]", '{"kills": 2}', '{"findings": []}'):
        (tmp_path / "kills.json").write_text(text)
        (finding,) = summary.read_stage(tmp_path, "kills")["findings"]
        assert finding["what"].startswith("its result cannot be read: ")
        assert finding["replay"] == "python kills.py --kills 2"
    (finding,) = summary.read_stage(tmp_path, "never")["findings"]
    assert finding["what"] == "it left no result; it did not end"
