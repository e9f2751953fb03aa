# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A contestant that fails costs only itself."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from benchmarks import deform_conv2d, deform_roi_pool, detector, failures, layer, measure, peers

from ..slim import SLIM
from .helpers import failing, measured, run, spoilt, tiny_stages


def test_a_peer_that_raises_costs_only_its_own_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deform_conv2d.Layer, "theirs", failing(lambda *_: True, deform_conv2d.Layer.theirs))
    status, rows = measured(deform_conv2d, tmp_path, "--quick", stages=tiny_stages(deform_conv2d))
    assert status == 0 and len(rows) == 4
    for row in rows:
        assert row["failed"] == {"torchvision": "RuntimeError: no kernel image"}
        assert {"dcn_d2 NHWC", "conv NHWC"} <= set(row["milliseconds"]) and "torchvision" not in row["milliseconds"]
    text = capsys.readouterr().out
    assert text.count("torchvision drops out: RuntimeError: no kernel image\n") == 1
    assert text.count("  failed: torchvision\n") == 4


RUNTIMES = pytest.mark.parametrize(
    ("name", "maker"), [("onnxruntime", "onnx_runtime"), ("openvino", "openvino_runtime")]
)


@RUNTIMES
def test_a_peer_that_cannot_be_made_ready_drops_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, maker: str
) -> None:
    monkeypatch.setattr(peers, maker, failing(lambda *_: True, getattr(peers, maker)))
    status, rows = measured(deform_conv2d, tmp_path, "--quick", stages=tiny_stages(deform_conv2d)[:1])
    assert status == 0 and rows[0]["failed"] == {name: "RuntimeError: no kernel image"}


@RUNTIMES
def test_a_peer_whose_values_are_wrong_drops_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, maker: str
) -> None:
    wrong = spoilt(lambda: torch.ones(1, 32, 4, 5))
    monkeypatch.setattr(peers, maker, lambda *_: lambda: [wrong().numpy()])
    status, rows = measured(deform_conv2d, tmp_path, "--quick", stages=tiny_stages(deform_conv2d)[:1])
    assert status == 0 and re.match(r"its output differs from .* by \d", rows[0]["failed"][name])
    assert name not in rows[0]["milliseconds"]


def test_who_raises_while_it_is_timed_drops_out(capsys: pytest.CaptureFixture[str]) -> None:
    calls = iter(range(9))
    contestants = {"a": lambda: sum(range(9)), "b": lambda: 1 // (next(calls) - 2), "c": lambda: 1 // 0, "d x": list}
    failed = {"d": "too slow"}
    found = measure.interleave(contestants, "cpu", 4, failed)
    assert list(found) == ["milliseconds"] and list(found["milliseconds"]) == ["a"]
    assert set(failed) == {"b", "c", "d"} and failed["c"].startswith("ZeroDivisionError: ")
    assert "c drops out: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["conv", "dcn_d2", "operands"])
def test_if_one_of_ours_fails_the_other_shapes_go_on_and_the_status_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "conv":
        monkeypatch.setattr(layer.F, "conv2d", failing(lambda x, *_: x.shape[1] == 32, layer.F.conv2d))
    elif what == "dcn_d2":
        monkeypatch.setattr(layer, "deform_conv2d", failing(lambda x, *_: x.shape[1] == 32, layer.deform_conv2d))
    else:
        monkeypatch.setattr(
            deform_conv2d, "Layer", failing(lambda shape, *_: shape.channels == 32, deform_conv2d.Layer)
        )
    status, rows = measured(deform_conv2d, tmp_path, "--quick", stages=tiny_stages(deform_conv2d))
    assert status == 1 and len(rows) == 4
    names = {"operands"} if what == "operands" else {f"{what} NCHW", f"{what} NHWC"}
    assert all(set(row["failed"]) == names and not names & set(row["milliseconds"]) for row in rows[:2])
    assert all("failed" not in row and "dcn_d2 NHWC" in row["milliseconds"] for row in rows[2:])
    assert what == "operands" or all("torchvision" in row["milliseconds"] for row in rows)


def test_without_a_reference_numbers_are_kept_and_the_status_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    status, rows = measured(
        deform_conv2d, tmp_path, "--quick", "--peers", "none", stages=tiny_stages(deform_conv2d)[:1]
    )
    assert status == 1
    for row in rows:
        assert set(row["failed"]) == {"reference"} and "dcn_d2 NHWC" in row["milliseconds"]


def test_pooling_that_fails_costs_only_its_own_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = [deform_roi_pool.Shape("tiny", 16, 20, 4, 24, rois=6, channels=channels, bins=3) for channels in (8, 4)]
    peer = failing(lambda pooling, x, dtype=None: dtype is None, deform_roi_pool.Pooling.roi_align)
    monkeypatch.setattr(deform_roi_pool.Pooling, "roi_align", peer)
    status, rows = measured(deform_roi_pool, tmp_path, "--quick", levels=levels)
    assert status == 0 and all(set(row["failed"]) == {"roi_align NCHW"} for row in rows)
    assert all("modulated NHWC" in row["milliseconds"] for row in rows)
    monkeypatch.undo()
    monkeypatch.setattr(
        deform_roi_pool, "deform_psroi_pool", failing(lambda x, *_: x.shape[1] == 8, deform_roi_pool.deform_psroi_pool)
    )
    status, rows = measured(deform_roi_pool, tmp_path, "--quick", levels=levels)
    ours = [set(row.get("failed", ())) for row in rows]
    assert status == 1 and ours == [{"psroi NCHW", "psroi NHWC"}] * 2 + [set()] * 2
    assert all("modulated NHWC" in row["milliseconds"] for row in rows)


def test_detectors_that_fail_cost_only_their_own_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = failing(lambda *_: True, detector._torchvision_by_branch)
    monkeypatch.setattr(detector, "_torchvision_by_branch", theirs)
    sizes: dict[str, Any] = {"size": (64, 96), "overrides": SLIM}
    status, (row,) = measured(detector, tmp_path, "--parts", "trunk", **sizes)
    assert status == 0 and set(row["failed"]) == {"torchvision NCHW"} and len(row["milliseconds"]) == 4
    monkeypatch.undo()
    original = detector.deform_conv.modulated_deform_conv2d
    monkeypatch.setattr(detector.deform_conv, "modulated_deform_conv2d", spoilt(original))
    status, (row,) = measured(detector, tmp_path, "--parts", "trunk", **sizes)
    assert status == 1 and set(row["failed"]) == {"dcn_d2 NCHW", "dcn_d2 NHWC"}
    assert set(row["milliseconds"]) == {"plain NCHW", "plain NHWC", "torchvision NCHW"}


def test_a_peer_that_takes_too_long_drops_out_of_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: dict[str, str] = {}
    assert failures.attempt(failed, "deformops NCHW", time.sleep, 30, seconds=0.05) is None
    assert failed == {"deformops": "TimeoutError: not done after 0.05 s"} == failures.too_slow(failed)
    assert failures.dropped(failed, "deformops NHWC") and not failures.dropped(failed, "dcn_d2 NHWC")
    assert failures.attempt(failed, "quick", lambda: 7, seconds=5) == 7 and "quick" not in failed
    assert failures.attempt(failed, "dcn_d2 NHWC", time.sleep, 0.1) is None and "dcn_d2 NHWC" not in failed


def test_peers_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dtypes = []
    original = torchvision.ops.deform_conv2d

    def observed(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        dtypes.append(x.dtype)
        return original(x, *arguments)

    monkeypatch.setattr(torchvision.ops, "deform_conv2d", observed)
    stages = tiny_stages(deform_conv2d)[:1]
    rows = run(deform_conv2d, tmp_path, "--quick", "--peers", "none", "--dtype", "float16", stages=stages)
    ours = {f"{name} {layout}" for name in ("conv", "dcn_d2") for layout in ("NCHW", "NHWC")}
    assert all(set(row["milliseconds"]) == ours for row in rows)
    assert dtypes == [torch.float32] * 2  # the comparison, forward and backward
    rows = run(deform_conv2d, tmp_path, "--quick", "--peers", "torchvision", "deformops", stages=stages)
    assert all(set(row["milliseconds"]) == {*ours, "torchvision"} for row in rows)
    with pytest.raises(SystemExit):
        deform_conv2d.main(["--peers", "none", "torchvision"])
    assert "all or none or some names" in capsys.readouterr().err
