# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Result files, where their numbers come from, and numbers in words."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import deform_conv2d, deform_roi_pool, detector, measure, origin, results, rows
from dev import readme

from ..slim import SLIM
from .helpers import FakeGpu, cuda_row, run, tiny_stages


def test_results_say_whether_the_tree_was_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DCN_COMMIT", raising=False)
    monkeypatch.setattr(origin, "PROJECT", tmp_path)

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def changes() -> Any:
        origin.commit.cache_clear()
        return origin.environment("cpu")["uncommitted_changes"]

    for name in ("source.py", "results/old.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    assert changes() is False
    (tmp_path / "results/old.json").write_text("2")
    assert changes() is False
    (tmp_path / "source.py").write_text("2")
    assert changes() is True


@pytest.mark.parametrize("what", ["no git", "no repository"])
def test_without_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.delenv("DCN_COMMIT", raising=False)
    if what == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        monkeypatch.setattr(origin, "PROJECT", tmp_path)
    environment = origin.environment("cpu")
    assert environment["commit"] == "unknown" and environment["uncommitted_changes"] is None
    document = {"environment": environment, "rows": [{"dtype": "float32"}]}
    assert "commit unknown, 2" in readme.caption(tmp_path / "x.json", document)  # the date follows


@pytest.mark.parametrize(
    ("named", "changes"), [("abc123def456", False), ("abc123def456 with changes", True)], ids=("clean", "changed")
)
def test_a_variable_names_the_commit_before_git_is_asked(
    monkeypatch: pytest.MonkeyPatch, named: str, changes: bool
) -> None:
    monkeypatch.setenv("DCN_COMMIT", named)
    monkeypatch.setattr(origin.subprocess, "run", None)
    environment = origin.environment("cpu")
    assert (environment["commit"], environment["uncommitted_changes"]) == ("abc123def456", changes)


def test_git_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DCN_COMMIT", raising=False)
    commands = []

    def ran(command: list[str], **_: Any) -> Any:
        commands.append(command[1])
        return SimpleNamespace(stdout="abc\n")

    monkeypatch.setattr(origin.subprocess, "run", ran)
    assert origin.environment("cpu")["commit"] == origin.environment("cpu")["commit"] == "abc"
    assert commands == ["rev-parse", "status"]


def test_rows_are_written_as_they_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = iter(range(3))

    def cut_off(*_: Any, **__: Any) -> dict[str, Any]:
        if next(rows) == 2:
            raise KeyboardInterrupt
        return {"milliseconds": {}}

    monkeypatch.setattr(measure, "interleave", cut_off)
    path = tmp_path / "new" / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        deform_conv2d.main(["--output", str(path), "--threads", "1", "--quick"], stages=tiny_stages(deform_conv2d))
    document = json.loads(path.read_text())
    assert len(document["rows"]) == 2 and document["complete"] is False and document["environment"]["commit"]
    assert "written" not in capsys.readouterr().out

    file = results.Results(path, "deform_conv2d", "cpu")
    monkeypatch.setattr(Path, "write_text", lambda path, text: path.open("w").write(text[:9]) and 1 // 0)
    with pytest.raises(ZeroDivisionError):
        file.finish()
    assert json.loads(path.read_text()) == document


def test_all_benchmarks_write_rows_as_they_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = []
    replace = os.replace

    def observed(source: Path, target: Path) -> None:
        complete.append(json.loads(Path(source).read_text())["complete"])
        replace(source, target)

    monkeypatch.setattr(results.os, "replace", observed)
    run(
        deform_roi_pool,
        tmp_path,
        "--quick",
        levels=[deform_roi_pool.Shape("t", 16, 20, 4, 24, rois=6, channels=8, bins=3)],
    )
    assert complete == [False, False, True]
    complete.clear()
    run(detector, tmp_path, "--parts", "trunk", size=(64, 96), overrides=SLIM)
    assert complete == [False, True]


def test_results_name_the_gpu_and_what_drives_it(
    fake_gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin.metadata, "version", lambda name: f"{name}-1")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    environment = origin.environment("cuda")
    names = ("torch", "torchvision", "onnxruntime", "openvino", "deformops", "triton")
    assert environment["versions"] == {name: f"{name}-1" for name in names}
    assert environment["gpu"].pop("driver") == "580.1"
    assert environment["gpu"] == {"capability": "9.0", "multiprocessors": 132, "cuda": "13.0", "cudnn": 91900}
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 1 // 0)
    assert set(origin.environment("cuda")["gpu"]) == {"capability", "multiprocessors", "cuda"}
    assert "gpu" not in origin.environment("cpu")


@pytest.mark.parametrize(
    ("milliseconds", "words"),
    [(0.03123, "31.2 us"), (0.9999, "1000 us"), (1.0, "1 ms"), (12.345, "12.3 ms"), (61234.5, "61234 ms"), (None, "-")],
)
def test_durations_have_three_digits(milliseconds: float | None, words: str) -> None:
    assert rows.duration(milliseconds) == words


def test_short_times_are_printed_with_enough_digits(
    convolutions_on_fake_gpu: Any,
) -> None:
    times = {"conv NHWC": 0.01234, "dcn_d2 NHWC": 0.03456, "torchvision": 1.0}
    row = cuda_row("c3", 2, times)
    line = convolutions_on_fake_gpu.describe(row)
    assert "conv  12.3 us  dcn_d2  34.6 us  price  2.80  speed: 28.94x torchvision" in line
    line = convolutions_on_fake_gpu.describe(row | {"milliseconds": {}})
    assert "conv        -  dcn_d2        -  price     -  speed: -" in line
    row = {"shape": {"name": "p2", "sampling": 2}, "pass": "forward", "threads": 1, "milliseconds": {}}
    assert "roi_align        -" in deform_roi_pool.describe(row)
    row["milliseconds"] = {"roi_align NCHW": {"median": 0.5}, "plain NHWC": {"median": 0.05}}
    assert "roi_align   500 us  plain 50 us (10.0x)" in deform_roi_pool.describe(row)
