# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from dcn_d2 import model_zoo
from dcn_d2.layers import DeformConv, ModulatedDeformConv

from .slim import slim_config

# Parameters of MMDetection 3.3's models for the same rows (the sum of the sizes of all entries of the state dict but
# the running statistics), and the number of their deformable convolutions.
MASK_HEAD = 2_643_280
ROWS = {
    "cascade_mask_rcnn_R_101_FPN_1x_dconv_c3-c5": (97_602_906, 30),
    "cascade_mask_rcnn_R_50_FPN_1x_dconv_c3-c5": (77_905_448, 13),
    "cascade_mask_rcnn_X_101_32x4d_FPN_1x_dconv_c3-c5": (98_517_082, 30),
    "cascade_rcnn_R_101_FPN_1x_dconv_c3-c5": (89_673_066, 30),
    "cascade_rcnn_R_50_FPN_1x_dconv_c3-c5": (69_975_608, 13),
    "faster_rcnn_R_101_FPN_1x_dconv_c3-c5": (62_031_356, 30),
    "faster_rcnn_R_50_FPN_1x_dconv_c3-c5": (42_333_898, 13),
    "faster_rcnn_R_50_FPN_1x_mdconv_c3-c5": (42_624_319, 13),
    "faster_rcnn_R_50_FPN_1x_mdconv_c3-c5_group4": (45_238_108, 13),
    "faster_rcnn_X_101_32x4d_FPN_1x_dconv_c3-c5": (62_945_532, 30),
    "mask_rcnn_R_101_FPN_1x_dconv_c3-c5": (64_674_636, 30),
    "mask_rcnn_R_50_FPN_1x_dconv_c3-c5": (44_977_178, 13),
    "mask_rcnn_R_50_FPN_1x_mdconv_c3-c5": (45_267_599, 13),
}
ROW = "faster_rcnn_R_50_FPN_1x_dconv_c3-c5"


def build_on_meta(name: str) -> tuple[CfgNode, nn.Module]:
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return cfg, build_model(cfg)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_row_builds_the_published_model(name: str) -> None:
    cfg, model = build_on_meta(name)
    parameters, convolutions = ROWS[name]
    if name.startswith("cascade_mask"):
        parameters -= 2 * MASK_HEAD  # Detectron2's cascade has one mask head, the published model one for each stage
    statistics = ("running_mean", "running_var", "num_batches_tracked", "pixel_mean", "pixel_std")
    sizes = [value.numel() for key, value in model.state_dict().items() if not key.endswith(statistics)]
    assert sum(sizes) == parameters
    deformable = [module for module in model.modules() if isinstance(module, (DeformConv, ModulatedDeformConv))]
    assert len(deformable) == convolutions
    assert all(isinstance(module, ModulatedDeformConv) == ("mdconv" in name) for module in deformable)
    assert all(module.deformable_groups == (4 if "group4" in name else 1) for module in deformable)
    assert all(module.groups == (32 if "32x4d" in name else 1) for module in deformable)
    assert cfg.MODEL.MASK_ON == hasattr(model.roi_heads, "mask_head")


def test_zoo_has_these_rows() -> None:
    assert model_zoo.list_models() == sorted(ROWS)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_published_weights_are_those_of_the_row(name: str) -> None:
    published = model_zoo.get_published(name)
    theirs = name.replace("_R_", "_r").replace("_X_", "_x").replace("_FPN_1x_", "_fpn_") + "_1x_coco"
    root = "http://download.openmmlab.com/mmdetection/v2.0/dcn"
    for key, end in (("WEIGHTS", ".pth"), ("LOG", ".log.json")):
        assert published[key].startswith(f"{root}/{theirs}/{theirs}") and published[key].endswith(end)
    cfg = model_zoo.get_config(name)
    assert 38 < cfg.PUBLISHED.BOX_AP < 50
    assert (37 < cfg.PUBLISHED.MASK_AP < cfg.PUBLISHED.BOX_AP) == ("mask" in name) == cfg.MODEL.MASK_ON
    assert ("MASK_AP" in published) == ("mask" in name)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_row_trains_as_published(name: str) -> None:
    cfg = model_zoo.get_config(name)
    assert cfg.SOLVER.MAX_ITER == 12 * 7330
    assert cfg.SOLVER.STEPS == (8 * 7330, 11 * 7330)
    assert cfg.SOLVER.BASE_LR / cfg.SOLVER.IMS_PER_BATCH == 0.02 / 16
    assert cfg.MODEL.DCN.NORM_EVAL and cfg.MODEL.RESNETS.NORM == "BN" and not cfg.MODEL.RESNETS.STRIDE_IN_1X1
    depth = {"R_50": "R-50", "R_101": "R-101", "X_101": "resnext101_32x4d"}
    assert next(file for row, file in depth.items() if row in name) in cfg.MODEL.WEIGHTS
    weights = cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS[2]
    if name.startswith("cascade"):
        assert [round(1 / weight, 9) for weight in weights] == [0.033, 0.033, 0.067, 0.067]
        assert round(1 / cfg.MODEL.RPN.SMOOTH_L1_BETA, 9) == 9


def test_trained_config_has_the_published_weights() -> None:
    url = model_zoo.get_checkpoint_url(ROW)
    assert model_zoo.get_config(ROW, trained=True).MODEL.WEIGHTS == url
    assert model_zoo.get_config(ROW).MODEL.WEIGHTS != url


def test_name_may_end_in_yaml() -> None:
    assert model_zoo.get_config_file(f"{ROW}.yaml") == model_zoo.get_config_file(ROW)


@pytest.mark.parametrize("name", ["faster_rcnn_R_50", "Base-RCNN-FPN", "../setup"])
def test_unknown_rows_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"no row '{name}'; its rows are .*{ROW}"):
        model_zoo.get_config_file(name)


def test_row_without_weights_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("VERSION: 2\n")
    monkeypatch.setattr(model_zoo, "_configs_dir", lambda: tmp_path)
    assert model_zoo.list_models() == ["mine"]
    with pytest.raises(ValueError, match="no weights are published for 'mine'"):
        model_zoo.get_checkpoint_url("mine")


def test_missing_configs_folder_says_where_it_was_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model_zoo, "__file__", str(tmp_path / "dcn_d2" / "model_zoo.py"))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/dcn_d2/configs, {tmp_path}/configs; reinstall"):
        model_zoo.list_models()


def test_get_builds_and_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained = build_model(slim_config())
    torch.save({"model": trained.state_dict()}, tmp_path / "model.pth")
    cfg = slim_config()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    monkeypatch.setattr(model_zoo, "get_config", lambda name, trained: cfg)
    model = model_zoo.get(ROW, device="cpu")
    assert model.training
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_asking_for_addresses_is_light() -> None:
    code = (
        "import sys; from dcn_d2 import model_zoo; "
        "[model_zoo.get_published(name) for name in model_zoo.list_models()]; "
        "assert not {'torch', 'detectron2'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
