# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The benchmark of predictions runs from end to end, and notices contestants that find something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import predict
from dcn_d2.engine import DCNPredictor

from ..slim import SLIM
from .helpers import measured, run

SIZES: dict[str, Any] = {"sizes": {"small": (64, 96)}, "overrides": SLIM}


def test_predict_times_every_contestant(tmp_path: Path) -> None:
    (row,) = run(predict, tmp_path, "--images", "8", **SIZES)
    assert set(row["milliseconds"]) == {"one by one", "many", "batches of 2", "batches of 4", "batches of 8"}
    assert row["shape"] == {"name": "R-50-FPN, small", "height": 64, "width": 96, "images": 8}


def test_several_threads_let_several_batches_run_at_once(tmp_path: Path) -> None:
    (row,) = run(predict, tmp_path, "--images", "4", "--threads", "2", **SIZES)
    assert {"at once, batches of 1", "at once, batches of 2", "at once, batches of 4"} < set(row["milliseconds"])


def test_who_finds_other_boxes_drops_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = DCNPredictor.stream
    monkeypatch.setattr(DCNPredictor, "stream", lambda self, images: [*stream(self, images)][::-1])
    status, (row,) = measured(predict, tmp_path, "--images", "4", **SIZES)
    assert status == 1 and set(row["milliseconds"]) == {"one by one"}
    assert "boxes are those of one by one" in row["failed"]["many"]


def test_contestants_are_chosen_by_name() -> None:
    calls = {name: list for name in ("one by one", "many", "batches of 2")}
    assert list(predict.choose(calls, ["many"])) == ["one by one", "many"]
    assert predict.choose(calls, None) == calls
