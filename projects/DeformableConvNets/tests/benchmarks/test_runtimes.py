# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The benchmark of exported models runs from end to end, and notices runtimes that compute something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import runtimes
from dev import readme

from ..slim import SLIM
from .helpers import failing, measured, run

SMALL: dict[str, Any] = {"size": (64, 96), "overrides": SLIM}


@pytest.fixture
def fake_runtimes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Replaces exported files: "runtimes" compute what the model does, and then scale it by a factor."""

    def install(factor: float) -> None:
        parts = {}

        class Part(runtimes.Part):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                parts[self.name] = self

        def run(file: Path, inputs: Any) -> dict[str, np.ndarray]:
            outputs = parts[file.stem].eager()
            first = next(iter(outputs))
            return outputs | {first: outputs[first] * np.float32(factor)}

        monkeypatch.setattr(runtimes, "Part", Part)
        monkeypatch.setattr(runtimes, "export", lambda cfg, path, **_: path)
        monkeypatch.setattr(
            runtimes, "open_session", lambda path, threads: SimpleNamespace(run=lambda inputs: run(path, inputs))
        )

    return install


def test_runtimes_times_both_parts_in_all_runtimes(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    rows = run(runtimes, tmp_path, **SMALL)
    assert [row["pass"] for row in rows] == ["backbone", "detector"]
    assert all(set(row["milliseconds"]) == {"dcn_d2", "onnxruntime", "openvino"} for row in rows)
    assert rows[0]["shape"] == {"name": "R-50-FPN", "height": 64, "width": 96, "batch": 1}
    ours, *others = (rows[1]["milliseconds"][name]["median"] for name in ("dcn_d2", "onnxruntime", "openvino"))
    cells = readme.numbers(ours, *(value for theirs in others for value in (theirs, ours / theirs)))
    assert f"| detector | 1 | {' | '.join(cells)} |" in readme.performance(tmp_path)


def test_runtimes_use_as_many_threads_as_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_runtimes: Callable[[float], None]
) -> None:
    fake_runtimes(1.0)
    opened: list[tuple[str, int]] = []
    set_in_torch: list[int] = []
    original = runtimes.open_session

    def open_session(path: Path, threads: int) -> Any:
        opened.append((path.name, threads))
        return original(path, threads)

    monkeypatch.setattr(runtimes, "open_session", open_session)
    monkeypatch.setattr(torch, "set_num_threads", set_in_torch.append)  # two threads are slow on one core
    rows = run(runtimes, tmp_path, "--parts", "backbone", "--threads", "1", "2", **SMALL)
    assert [row["threads"] for row in rows] == [1, 2] == set_in_torch
    assert opened == [(name, threads) for threads in (1, 2) for name in ("backbone.onnx", "backbone.xml")]


def test_runtimes_that_compute_something_else_drop_out(tmp_path: Path, fake_runtimes: Callable[[float], None]) -> None:
    fake_runtimes(1.01)
    status, rows = measured(runtimes, tmp_path, **SMALL)
    assert status == 0  # another implementation costs only its own numbers
    assert all(set(row["milliseconds"]) == {"dcn_d2"} for row in rows)
    features, boxes = (row["failed"]["openvino"] for row in rows)
    assert features == "its p2 differs from PyTorch's by 0.01 (relative)"
    assert "boxes are PyTorch's" in boxes


def test_a_runtime_to_which_nothing_can_be_exported_drops_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_runtimes: Callable[[float], None]
) -> None:
    fake_runtimes(1.0)
    monkeypatch.setattr(runtimes, "export", failing(lambda cfg, path: path.suffix == ".xml", lambda *_, **__: True))
    status, (row,) = measured(runtimes, tmp_path, "--parts", "detector", **SMALL)
    assert status == 0 and row["failed"] == {"openvino": "RuntimeError: no kernel image"}
    assert set(row["milliseconds"]) == {"dcn_d2", "onnxruntime"}


def test_places_without_a_detection_do_not_count() -> None:
    box = [[[1.0, 2.0, 30.0, 40.0], [0.0, 0.0, 0.0, 0.0]]]
    filled = {"boxes": np.array(box, np.float32), "scores": np.array([[0.5, 0.0]], np.float32)}
    filled["classes"] = np.array([[3, -1]])
    expected = {name: values[:, :1] for name, values in filled.items()}
    assert runtimes.different_boxes(filled, expected) == ""
    expected["classes"] = np.array([[4]])
    assert runtimes.different_boxes(filled, expected) == "only 0 of 1 boxes are PyTorch's"
    nothing = {name: values[:, 1:] for name, values in filled.items()}
    assert runtimes.different_boxes(nothing, nothing) == "only 0 of 0 boxes are PyTorch's"  # it compares nothing


@pytest.mark.parametrize("arguments", [["--dtype", "bfloat16"], ["--dtype", "float16"]])
def test_only_float32_is_measured(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        runtimes.main(arguments)
    assert f"only the CPU and float32 are measured, got --device cpu --dtype {arguments[1]}" in capsys.readouterr().err
