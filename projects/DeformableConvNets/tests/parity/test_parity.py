# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Every row against MMDetection itself, at a reduced resolution; `python -m benchmarks.parity` does it at full size.

CONTRIBUTING.md says how to install what this needs. `test_golden.py` is what remains of it where mmdet is absent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.parity.rows import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    OTHER_POOLERS,
    ROWS,
    SMALL_SCALE,
    TOLERANCES,
    TRAINED_ROWS,
)

pytest.importorskip("mmdet", reason="the comparison with MMDetection needs mmdet 3.3 and mmcv 2.1 with operators")
pytest.importorskip("mmcv._ext", reason="the comparison with MMDetection needs mmcv 2.1 built with its CPU operators")
pytest.importorskip("skimage", reason="the comparison with MMDetection needs the photographs of scikit-image")

from benchmarks.parity import runner  # noqa: E402  imports mmdet

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """For weights and caches; they are large, so nothing of it stays."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.unlink()


def check(row: dict[str, Any]) -> None:
    """Holds a row of differences against what is allowed."""
    assert row["detections"] >= 50 and row["classes"] >= 5, f"the weights give too little to compare: {row}"
    assert row["detections_matched"] == row["detections_ours"] == row["detections"], row
    assert row["proposals_matched"] == row["proposals"], row
    worse = {name: row[name] for name, allowed in TOLERANCES.items() if row.get(name, 0.0) > allowed}
    assert not worse, f"differences above {TOLERANCES}: {row}"


@pytest.mark.parametrize("row", ROWS)
def test_detections_equal_those_of_mmdetection(row: str, folder: Path) -> None:
    photograph = runner.PHOTOGRAPHS[list(ROWS).index(row) % len(runner.PHOTOGRAPHS)]
    check(runner.compare_detections(row, photograph, SMALL_SCALE, folder, old_offset_names="mask_rcnn_R_50" in row))


@pytest.mark.parametrize("row", OTHER_POOLERS)
def test_detections_with_the_pooling_of_later_mmdetection(row: str, folder: Path) -> None:
    check(runner.compare_detections(row, "coffee", SMALL_SCALE, folder, pooling="aligned"))


@pytest.mark.parametrize("row", TRAINED_ROWS)
def test_losses_and_gradients_equal_those_of_mmdetection(row: str) -> None:
    terms, gradients = runner.compare_losses(row)
    for name, (ours, theirs) in terms.items():
        assert theirs > 1e-5, f"{name} is {theirs}: there is nothing to compare"
        assert ours == pytest.approx(theirs, rel=LOSS_TOLERANCE), name
    worst = max(gradients, key=gradients.__getitem__)
    assert gradients[worst] < GRADIENT_TOLERANCE, (
        f"gradients differ most in {worst}, by {gradients[worst]:.1e} of their norm"
    )
