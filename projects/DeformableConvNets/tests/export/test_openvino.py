# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""OpenVINO's files give the model's detections, at other sizes and batches than they were traced with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dcn_d2 import model_zoo
from dcn_d2.export.compare import TOLERANCES
from dcn_d2.export.detector import ExportableDetector
from dcn_d2.export.formats import open_session

from .models import lively_model
from .running import assert_same, exported, inputs_of, run_module

pytest.importorskip("openvino", reason="openvino is not installed")

TWO, ONE, SMALL = [(100, 150), (128, 131)], [(70, 200)], [(64, 64), (33, 20)]
MASK_ROW = "mask_rcnn_R_50_FPN_1x_mdconv_c3-c5"
TOLERANCE = TOLERANCES["float32"]


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.slow if "101" in row else ()) for row in model_zoo.list_models()]
)
def test_every_row_runs_at_free_sizes_and_batches(row: str, tmp_path: Path) -> None:
    module = exported(row, tmp_path / "model.xml")
    assert_same(tmp_path / "model.xml", module, inputs_of(TWO), inputs_of(ONE), inputs_of(SMALL), tolerance=TOLERANCE)


@pytest.mark.parametrize("row", [MASK_ROW, "cascade_mask_rcnn_R_50_FPN_1x_dconv_c3-c5"])
def test_pasted_masks_have_the_size_that_is_asked_for(row: str, tmp_path: Path) -> None:
    module = exported(row, tmp_path / "model.xml", masks="pasted")
    batches = inputs_of(TWO, pasted=True), inputs_of(ONE, pasted=True)
    assert_same(tmp_path / "model.xml", module, *batches, tolerance=TOLERANCE)


def test_masks_may_be_left_out(tmp_path: Path) -> None:
    module = exported(MASK_ROW, tmp_path / "model.xml", masks="none")
    assert_same(tmp_path / "model.xml", module, inputs_of(TWO), tolerance=TOLERANCE)


def test_a_backbone_gives_its_maps(tmp_path: Path) -> None:
    module = exported(MASK_ROW, tmp_path / "model.xml", part="backbone")
    assert_same(tmp_path / "model.xml", module, inputs_of(TWO), inputs_of(ONE), tolerance=TOLERANCE)


def test_a_fixed_size_and_batch_take_no_others(tmp_path: Path) -> None:
    module = exported(MASK_ROW, tmp_path / "model.xml", size=(96, 128), batch=1)
    assert_same(tmp_path / "model.xml", module, inputs_of([(96, 120)]), tolerance=TOLERANCE)
    session = open_session(tmp_path / "model.xml")
    for sizes in ([(96, 160)], [(96, 120), (90, 128)]):
        with pytest.raises(ValueError, match=r"takes images of float32 \(1, 3, 96, 128\), got float32 \("):
            session.run(inputs_of(sizes))


def test_images_without_detections(tmp_path: Path) -> None:
    best = run_module(ExportableDetector(lively_model(MASK_ROW)[1]), inputs_of(TWO))["scores"].max(axis=1)
    threshold, empty = float(best.mean()), int(best.argmin())
    module = exported(MASK_ROW, tmp_path / "model.xml", ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", threshold])
    session, inputs = open_session(tmp_path / "model.xml"), inputs_of(TWO)
    results, expected = session.run(inputs), run_module(module, inputs)
    assert (expected["classes"][empty] == -1).all() and expected["classes"][1 - empty].max() >= 0
    for name in ("boxes", "scores", "classes"):
        np.testing.assert_allclose(results[name], expected[name], atol=1e-3)
    alone = session.run({name: array[[empty]] for name, array in inputs.items()})
    assert (alone["classes"] == -1).all() and not alone["boxes"].any() and not alone["scores"].any()


def test_float16_halves_the_weights_and_changes_results_little(tmp_path: Path) -> None:
    full = exported(MASK_ROW, tmp_path / "full.xml", part="backbone")
    exported(MASK_ROW, tmp_path / "half.xml", part="backbone", dtype="float16")
    sizes = [(tmp_path / f"{name}.bin").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.55 * sizes[1]
    assert_same(tmp_path / "half.xml", full, inputs_of(TWO), tolerance=TOLERANCES["float16"])


def test_threads_and_arithmetic_are_those_that_are_asked_for(tmp_path: Path) -> None:
    exported("faster_rcnn_R_50_FPN_1x_dconv_c3-c5", tmp_path / "model.xml", part="backbone")
    compiled = open_session(tmp_path / "model.xml", threads=1)._compiled  # type: ignore[attr-defined]
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
