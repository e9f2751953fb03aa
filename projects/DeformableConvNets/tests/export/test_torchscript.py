# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""TorchScript files give the model's detections, at other sizes and batches than they were traced with."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dcn_d2 import model_zoo
from dcn_d2.export.formats import open_session

from .running import assert_same, exported, inputs_of, run_module

TWO, ONE = [(100, 150), (128, 131)], [(70, 200)]


@pytest.mark.parametrize("row", model_zoo.list_models())
def test_every_row_runs_at_free_sizes_and_batches(row: str, tmp_path: Path) -> None:
    module = exported(row, tmp_path / "model.ts")
    assert_same(tmp_path / "model.ts", module, inputs_of(TWO), inputs_of(ONE))


def test_pasted_masks_have_the_size_that_is_asked_for(tmp_path: Path) -> None:
    module = exported("mask_rcnn_R_50_FPN_1x_mdconv_c3-c5", tmp_path / "model.ts", masks="pasted")
    assert_same(tmp_path / "model.ts", module, inputs_of(TWO, pasted=True), inputs_of(ONE, pasted=True))


def test_a_backbone_gives_its_maps(tmp_path: Path) -> None:
    module = exported("faster_rcnn_R_50_FPN_1x_mdconv_c3-c5", tmp_path / "model.ts", part="backbone")
    assert_same(tmp_path / "model.ts", module, inputs_of(TWO), inputs_of(ONE))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_detector_gives_the_same_bits_as_in_torch_in_each_dtype(dtype: str, tmp_path: Path) -> None:
    # The row has no modulated convolutions: in eager mode, those are another operator.
    module = exported("cascade_rcnn_R_50_FPN_1x_dconv_c3-c5", tmp_path / "model.ts", dtype=dtype)
    session = open_session(tmp_path / "model.ts")
    for inputs in (inputs_of(TWO), inputs_of(ONE)):
        found = session.run(inputs)
        for name, expected in run_module(module, inputs).items():
            assert np.array_equal(found[name], expected), name


def test_frozen_weights_give_the_same_detections(tmp_path: Path) -> None:
    path = tmp_path / "model.ts"
    module = exported("faster_rcnn_R_50_FPN_1x_mdconv_c3-c5", path, freeze=True)
    assert_same(path, module, inputs_of(TWO), inputs_of(ONE))
    assert not list(torch.jit.load(path).parameters())


def test_an_image_without_detections_beside_one_with_some(tmp_path: Path) -> None:
    row, inputs = "mask_rcnn_R_50_FPN_1x_mdconv_c3-c5", inputs_of(TWO)
    best = run_module(exported(row, tmp_path / "model.ts"), inputs)["scores"].max(axis=1)
    threshold = float(best.mean())
    exported(row, tmp_path / "model.ts", ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", threshold], overwrite=True)
    results = open_session(tmp_path / "model.ts").run(inputs)
    empty = int(best.argmin())
    assert (results["classes"][empty] == -1).all() and not results["boxes"][empty].any()
    assert results["scores"][1 - empty].max() > threshold and results["classes"][1 - empty].max() >= 0


def test_writing_and_loading_warn_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")  # Detectron2, when it builds
        warnings.filterwarnings("ignore", message="torch.meshgrid")
        module = exported("faster_rcnn_R_50_FPN_1x_dconv_c3-c5", tmp_path / "model.ts", size=(96, 128), batch=1)
        assert_same(tmp_path / "model.ts", module, inputs_of([(96, 120)]))
