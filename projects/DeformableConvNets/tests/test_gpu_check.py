# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The stages of dev/gpu_check.sh with a stand-in for Python: which run, what they leave, what a failure changes."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from dev import losses

STAGES = "load tests blame determinism training conv2d pooling detector goals memcheck racecheck".split()
# Does what its arguments ask of Python, as far as the script looks at it; FAIL and HANG are patterns of arguments.
STAND_IN = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$LOG"
[[ -n ${FAIL:-} && $* =~ $FAIL ]] && exit 3
[[ -n ${HANG:-} && $* =~ $HANG ]] && sleep 60
previous=
for word in "$@"; do
  if [[ $previous == --output ]]; then echo '{}' >"$word"; fi
  previous=$word
done
if [[ $1 == - ]]; then cat >/dev/null; echo "Some GPU"; fi
if [[ $* == *pytest* ]]; then echo "7 passed, 1 skipped"; fi
if [[ $* == *--check* ]]; then echo "yes          a goal"; fi
exit 0
"""


def run(
    project: Path, folder: Path, *stages: str, seconds: int = 100, **variables: str
) -> tuple[subprocess.CompletedProcess[str], str, list[str]]:
    """Runs the script; returns what it did, its summary and the stand-in's calls."""
    tools = folder / "tools"
    tools.mkdir()
    for name, text in (("python", STAND_IN), ("compute-sanitizer", '#!/bin/sh\nshift 8\nexec "$@"\n')):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    results, log = folder / "results", folder / "log"
    environment = {name: value for name, value in os.environ.items() if name not in ("RESULTS", "OUT")}
    environment |= {"PYTHON": str(tools / "python"), "OUT": str(results), "LOG": str(log)} | variables
    environment |= {"PATH": f"{tools}:{environment['PATH']}", "SECONDS_LEFT": str(seconds)}
    done = subprocess.run(
        ["bash", str(project / "dev/gpu_check.sh"), *stages], env=environment, capture_output=True, text=True
    )
    summary = results / "summary.txt"
    return done, summary.read_text() if summary.exists() else "", log.read_text().splitlines() if log.exists() else []


def verdicts(summary: str) -> dict[str, str]:
    return {stage: verdict for verdict, stage in re.findall(r"^(PASS|FAIL) (\w+) ", summary, re.M)}


def test_every_stage_runs_and_leaves_its_output(project: Path, tmp_path: Path) -> None:
    done, summary, calls = run(project, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdicts(summary) == dict.fromkeys(STAGES, "PASS")
    assert summary.startswith("commit ") and "Some GPU" in summary and "yes          a goal" in summary
    results = tmp_path / "results"
    assert all((results / f"{stage}.txt").exists() for stage in STAGES)
    dtypes = ("bfloat16", "float16", "tf32", "float32")
    assert all((results / f"deform_conv2d_cuda_{dtype}.json").exists() for dtype in dtypes)
    (check,) = [call for call in calls if "--check" in call]
    assert check.count("_cuda_") == len(dtypes) + 1 + 2 + 1


def test_a_stage_that_fails_does_not_stop_the_others(project: Path, tmp_path: Path) -> None:
    done, summary, _ = run(project, tmp_path, FAIL="not determin|train_net")
    assert done.returncode == 1
    wrong = dict.fromkeys(("tests", "training"), "FAIL")
    assert verdicts(summary) == dict.fromkeys(STAGES, "PASS") | wrong
    assert re.search(r"FAIL tests \(\d+ s, exit status 1\)", summary)


def test_kernels_run_one_by_one_only_where_the_tests_failed(project: Path, tmp_path: Path) -> None:
    for folder, fail, processes in (("passed", "", 0), ("failed", "not determin", 5)):
        (tmp_path / folder).mkdir()
        _, summary, calls = run(project, tmp_path / folder, "tests", "blame", FAIL=fail)
        assert verdicts(summary)["blame"] == "PASS"
        assert sum("one_by_one" in call for call in calls) == processes


def test_a_stage_out_of_time_is_stopped_and_no_other_begins_late(project: Path, tmp_path: Path) -> None:
    done, summary, _ = run(project, tmp_path, "load", "tests", "detector", "memcheck", seconds=4, HANG="detector")
    assert done.returncode == 1
    found = {"load": "PASS", "tests": "PASS", "detector": "FAIL", "memcheck": "FAIL"}
    assert verdicts(summary) == found
    assert re.search(r"FAIL detector \(\d+ s, stopped after [34] s\)", summary)
    assert "no time was left" in summary


def test_without_a_gpu_nothing_else_runs(project: Path, tmp_path: Path) -> None:
    done, summary, calls = run(project, tmp_path, FAIL="^-$")
    assert done.returncode == 1
    assert verdicts(summary) == {"load": "FAIL"} and "nothing else can run" in summary
    assert calls == ["-"]


def test_a_run_in_which_every_test_was_skipped_fails(project: Path, tmp_path: Path) -> None:
    done, summary, _ = run(project, tmp_path, "determinism", PYTHON="/bin/true")
    assert done.returncode == 1 and verdicts(summary) == {"determinism": "FAIL"}
    assert "no test ran on the GPU" in done.stdout


def test_unknown_stages_are_refused(project: Path, tmp_path: Path) -> None:
    done, summary, calls = run(project, tmp_path, "tests", "bench")
    assert done.returncode == 2 and "unknown stage 'bench'" in done.stderr
    assert not summary and not calls


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([3.0, 2.5, 2.0, 1.5], ""),
        ([3.0, 2.5, 2.0, 3.5], "from 3.000 to 3.500"),
        ([3.0, float("nan"), 2.0, 1.5], "not finite"),
        ([3.0, 2.0], "only 2 losses"),
    ],
)
def test_losses_must_be_finite_and_fall(values: list[float], message: str) -> None:
    found = losses.judge(values)
    assert message in found and bool(message) == bool(found)
