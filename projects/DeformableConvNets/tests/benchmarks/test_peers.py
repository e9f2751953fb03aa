# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Other runtimes take part in the benchmark of convolutions where they are installed, and compute the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import deform_conv2d, peers

from .helpers import run

TINY = deform_conv2d.Shape("tiny", 32, 4, 5)
RUNTIMES = pytest.mark.parametrize(
    ("name", "packages"), [("onnxruntime", ("onnx", "onnxruntime")), ("openvino", ("openvino",))]
)


@RUNTIMES
def test_a_runtime_computes_every_variation_forward_in_float32(
    tmp_path: Path, name: str, packages: tuple[str, ...]
) -> None:
    for package in packages:
        pytest.importorskip(package)
    # `run` asserts that nobody dropped out, which is who computes something else than torchvision.
    rows = run(deform_conv2d, tmp_path, "--peers", name, stages=[TINY])
    assert len(rows) == 6 * 2
    assert all((name in row["milliseconds"]) == (row["pass"] == "forward") for row in rows)
    (row, _) = run(deform_conv2d, tmp_path, "--quick", "--peers", name, "--dtype", "bfloat16", stages=[TINY])
    assert name not in row["milliseconds"]


@RUNTIMES
def test_a_runtime_that_is_not_installed_takes_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, packages: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, packages[-1], None)
    row, _ = run(deform_conv2d, tmp_path, "--quick", "--peers", name, stages=[TINY])
    assert name not in row["milliseconds"] and "dcn_d2 NHWC" in row["milliseconds"]


def test_openvino_computes_in_float32_on_as_many_threads_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino")
    compiled = []
    original = openvino.Core.compile_model

    def observed(core: Any, *arguments: Any) -> Any:
        compiled.append(original(core, *arguments))
        return compiled[-1]

    monkeypatch.setattr(openvino.Core, "compile_model", observed)
    torch.set_num_threads(1)
    convolution = deform_conv2d.Layer(TINY, "cpu", torch.float32)
    assert "openvino" in convolution.contestants(False)
    (model,) = compiled
    asked = {name: str(model.get_property(name)) for name in ("INFERENCE_NUM_THREADS", "NUM_STREAMS")}
    assert asked == {"INFERENCE_NUM_THREADS": "1", "NUM_STREAMS": "1"}
    assert "float32" in str(model.get_property("INFERENCE_PRECISION_HINT"))


def test_the_memory_of_openvino_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = []
    monkeypatch.setattr(deform_conv2d, "measure_memory", lambda arguments, *_: chosen.extend(arguments.peers))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert deform_conv2d.main(["--memory", "--output", str(tmp_path / "rows.json")]) == 0
    assert chosen == [name for name in peers.CONVOLUTION_PEERS if name != "openvino"]
