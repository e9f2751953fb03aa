# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Files of torch.export give the model's detections at all sizes and batches, also when AOTInductor compiled them."""

from __future__ import annotations

import platform
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch._inductor
from detectron2.modeling import build_model

from dcn_d2.export import export, pt2
from dcn_d2.export.formats import open_session
from dcn_d2.export.pt2 import Session

from ..slim import slim_config
from .models import images
from .running import assert_same, exported, inputs_of

TWO, ONE = [(100, 150), (128, 131)], [(70, 200)]


# One of each kind, since an export takes seconds. Masks are below, and all rows in test_torchscript.py.
@pytest.mark.parametrize("row", ["faster_rcnn_R_50_FPN_1x_mdpool", "cascade_rcnn_R_50_FPN_1x_dconv_c3-c5"])
def test_rows_run_at_free_sizes_and_batches(row: str, tmp_path: Path) -> None:
    module = exported(row, tmp_path / "model.pt2")
    # The last one is narrow: its canvas is as high as the divisibility.
    assert_same(tmp_path / "model.pt2", module, inputs_of(TWO), inputs_of(ONE), inputs_of([(20, 100)]))


def test_long_images_need_no_more_than_one_unit_of_height(tmp_path: Path) -> None:
    """An image of 1000 x 20 pixels, with a longer side of at most 1333, is resized to 1333 x 27."""
    module = exported("faster_rcnn_R_50_FPN_1x_dconv_c3-c5", tmp_path / "model.pt2")
    assert_same(tmp_path / "model.pt2", module, inputs_of([(27, 1333)]), inputs_of([(300, 20), (31, 32)]))


def test_a_backbone_that_does_not_pad_images_has_free_sizes(tmp_path: Path) -> None:
    opts: list[Any] = ["MODEL.BACKBONE.NAME", "build_dcn_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res5"]]
    opts += ["MODEL.RPN.IN_FEATURES", ["res5"], "MODEL.ROI_HEADS.IN_FEATURES", ["res5"]]
    opts += ["MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64, 128]]]
    module = exported("faster_rcnn_R_50_FPN_1x_dconv_c3-c5", tmp_path / "model.pt2", opts)
    assert open_session(tmp_path / "model.pt2").description.size_divisibility == 1
    odd = {"images": images(1, 101, 67).numpy(), "image_sizes": np.array([[101, 67]])}
    assert_same(tmp_path / "model.pt2", module, odd, inputs_of(TWO))


def test_pasted_masks_have_the_size_that_is_asked_for(tmp_path: Path) -> None:
    module = exported("mask_rcnn_R_50_FPN_1x_mdconv_c3-c5", tmp_path / "model.pt2", masks="pasted")
    assert_same(tmp_path / "model.pt2", module, inputs_of(TWO, pasted=True), inputs_of(ONE, pasted=True))


def test_a_backbone_without_fpn_takes_any_size_from_33_on(tmp_path: Path) -> None:
    cfg = slim_config()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS.OUT_FEATURES = "build_dcn_resnet_backbone", ["res4"]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32, 64]]
    exported_file = export(cfg, tmp_path / "model.pt2", model=build_model(cfg), part="backbone", check=False)
    assert exported_file.description.size_divisibility == 1
    for height, width in ((64, 65), (131, 1100)):
        given = {"images": np.ones((1, 3, height, width), np.float32), "image_sizes": np.array([[height, width]])}
        shape = open_session(exported_file.path).run(given)["res4"].shape
        assert shape[2:] == (-(-height // 16), -(-width // 16))


def test_a_backbone_of_fixed_size_and_batch_refuses_others_and_holds_no_pickle(tmp_path: Path) -> None:
    row, path = "faster_rcnn_R_50_FPN_1x_dconv_c3-c5", tmp_path / "model.pt2"
    module = exported(row, path, part="backbone", size=(96, 128), batch=1, dtype="bfloat16")
    assert_same(path, module, inputs_of([(90, 120)]))
    with pytest.raises((AssertionError, RuntimeError), match="128"):
        open_session(path).run(inputs_of(ONE))
    with zipfile.ZipFile(path) as archive:
        assert not any(archive.getinfo(name).file_size for name in archive.namelist() if "sample_inputs" in name)
        configs = [archive.read(name) for name in archive.namelist() if name.endswith("_config.json")]
    assert configs and not any(b'"use_pickle": true' in config for config in configs)


def test_compiling_without_a_compiler_is_refused(tmp_path: Path) -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ValueError, match="needs a C.. compiler, and no-such-compiler does not run"),
    ):
        exported("faster_rcnn_R_50_FPN_1x_dconv_c3-c5", tmp_path / "model.pt2", part="backbone", compile=True)
    assert not list(tmp_path.iterdir())


def test_compiling_with_torch_2_10_was_an_attribute_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(pt2, "hasattr", lambda thing, name: name != "march", raising=False)
    with pytest.raises(ValueError, match="Export with a later version, or without compiling"):
        pt2._check_compiler()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_compiled_backbone_runs_at_free_sizes_and_batches(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    module = exported("faster_rcnn_R_50_FPN_1x_mdconv_c3-c5", path, part="backbone", compile=True)
    assert Session(path).compiled
    assert_same(path, module, inputs_of(TWO), inputs_of(ONE), inputs_of([(64, 64)] * 3))
    for changed, message in (
        ((b'"AOTI_MACHINE": "', b'"AOTI_MACHINE": "z'), "was compiled for z"),
        ((b'"AOTI_CPU_ISA": "', b'"AOTI_CPU_ISA": "AMX_TILE '), "processors with AMX_TILE"),
    ):
        copy_with(path, tmp_path / "other.pt2", changed)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setitem(Session.__init__.__globals__["_INSTRUCTION_SETS"], "AMX_TILE", lambda: False)
            Session(tmp_path / "other.pt2")


def copy_with(source: Path, target: Path, changed: tuple[bytes, bytes]) -> None:
    """Copies an archive, and changes its metadata."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info, content.replace(*changed) if info.filename.endswith("_metadata.json") else content)
