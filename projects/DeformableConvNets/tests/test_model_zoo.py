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
from dcn_d2.config import ConfigError
from dcn_d2.layers import DeformConv, ModulatedDeformConv

from .slim import slim_config

# Parameters of MMDetection 3.3's models for the same rows (the sum of the sizes of all entries of the state dict but
# the running statistics), and the number of their deformable convolutions.
ROWS = {
    "cascade_mask_rcnn_R_101_FPN_1x_dconv_c3-c5": (97_602_906, 30),
    "cascade_mask_rcnn_R_50_FPN_1x_dconv_c3-c5": (77_905_448, 13),
    "cascade_mask_rcnn_X_101_32x4d_FPN_1x_dconv_c3-c5": (98_517_082, 30),
    "cascade_rcnn_R_101_FPN_1x_dconv_c3-c5": (89_673_066, 30),
    "cascade_rcnn_R_50_FPN_1x_dconv_c3-c5": (69_975_608, 13),
    "faster_rcnn_R_101_FPN_1x_dconv_c3-c5": (62_031_356, 30),
    "faster_rcnn_R_50_FPN_1x_dconv_c3-c5": (42_333_898, 13),
    "faster_rcnn_R_50_FPN_1x_dpool": (97_737_576, 0),
    "faster_rcnn_R_50_FPN_1x_mdconv_c3-c5": (42_624_319, 13),
    "faster_rcnn_R_50_FPN_1x_mdconv_c3-c5_group4": (45_238_108, 13),
    "faster_rcnn_R_50_FPN_1x_mdpool": (149_322_796, 0),
    "faster_rcnn_X_101_32x4d_FPN_1x_dconv_c3-c5": (62_945_532, 30),
    "mask_rcnn_R_101_FPN_1x_dconv_c3-c5": (64_674_636, 30),
    "mask_rcnn_R_50_FPN_1x_dconv_c3-c5": (44_977_178, 13),
    "mask_rcnn_R_50_FPN_1x_fp16_dconv_c3-c5": (44_977_178, 13),
    "mask_rcnn_R_50_FPN_1x_fp16_mdconv_c3-c5": (45_267_599, 13),
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
    folder = "fp16" if "fp16" in name else "dcn"
    root = f"http://download.openmmlab.com/mmdetection/v2.0/{folder}/{theirs}/{theirs}"
    assert published["WEIGHTS"].startswith(root) and published["WEIGHTS"].endswith(".pth")
    cfg = model_zoo.get_config(name)
    assert cfg.PUBLISHED.LOG == published.get("LOG", "")
    assert not cfg.PUBLISHED.LOG or cfg.PUBLISHED.LOG.startswith(root) and cfg.PUBLISHED.LOG.endswith(".log.json")
    assert 38 < cfg.PUBLISHED.BOX_AP < 50
    assert (37 < cfg.PUBLISHED.MASK_AP < cfg.PUBLISHED.BOX_AP) == ("mask" in name) == cfg.MODEL.MASK_ON
    assert ("MASK_AP" in published) == ("mask" in name)


def test_logs_are_known_of_all_rows_but_one() -> None:
    without = [name for name in model_zoo.list_models() if not model_zoo.get_config(name).PUBLISHED.LOG]
    assert without == ["mask_rcnn_R_50_FPN_1x_fp16_dconv_c3-c5"]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_row_trains_as_published(name: str) -> None:
    cfg = model_zoo.get_config(name)
    solver = cfg.SOLVER
    assert solver.MAX_ITER == 12 * 7330
    assert solver.STEPS == (8 * 7330, 11 * 7330)
    assert (solver.GAMMA, solver.WARMUP_METHOD, solver.WARMUP_ITERS, solver.WARMUP_FACTOR) == (0.1, "linear", 500, 1e-3)
    assert solver.BASE_LR / solver.IMS_PER_BATCH == 0.02 / 16
    assert (solver.MOMENTUM, solver.NESTEROV, solver.CLIP_GRADIENTS.ENABLED) == (0.9, False, False)
    assert (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM, solver.WEIGHT_DECAY_BIAS) == (1e-4, 1e-4, None)
    assert (solver.BIAS_LR_FACTOR, solver.OFFSET_LR_FACTOR) == (1, 1)
    assert solver.AMP.ENABLED == ("fp16" in name)
    assert cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and cfg.DATALOADER.ASPECT_RATIO_GROUPING
    depth = {"R_50": "R-50", "R_101": "R-101", "X_101": "resnext101_32x4d"}
    assert next(file for row, file in depth.items() if row in name) in cfg.MODEL.WEIGHTS


@pytest.mark.parametrize("name", sorted(ROWS))
def test_row_reads_images_as_mmdetection(name: str) -> None:
    read = model_zoo.get_config(name).INPUT
    assert (read.FORMAT, read.RESIZE_WITH, read.MASK_FORMAT) == ("RGB", "cv2", "bitmask")
    assert (read.MIN_SIZE_TRAIN, read.MAX_SIZE_TRAIN, read.MIN_SIZE_TEST, read.MAX_SIZE_TEST) == (
        *((800,), 1333),
        *(800, 1333),
    )
    assert read.RANDOM_FLIP == "horizontal" and not read.CROP.ENABLED
    model = model_zoo.get_config(name).MODEL
    assert model.PIXEL_MEAN == [123.675, 116.28, 103.53] and model.PIXEL_STD == [58.395, 57.12, 57.375]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_row_is_the_detector_of_mmdetection(name: str) -> None:
    """The tables of MMDetection's settings, row by row; what is Detectron2's default too is here as well."""
    model = model_zoo.get_config(name).MODEL
    cascade, masks = name.startswith("cascade"), "mask" in name
    assert model.DCN.NORM_EVAL and model.RESNETS.NORM == "BN" and not model.RESNETS.STRIDE_IN_1X1
    assert (model.BACKBONE.FREEZE_AT, model.FPN.NORM, model.FPN.FUSE_TYPE) == (2, "", "sum")

    anchors, rpn = model.ANCHOR_GENERATOR, model.RPN
    assert anchors.SIZES == [[32], [64], [128], [256], [512]]
    assert (anchors.ASPECT_RATIOS, anchors.OFFSET) == ([[0.5, 1.0, 2.0]], 0.0)
    assert (rpn.PRE_NMS_TOPK_TEST, rpn.POST_NMS_TOPK_TEST, rpn.NMS_THRESH) == (1000, 1000, 0.7)
    assert (rpn.PRE_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TRAIN) == (2000, 2000 if cascade else 1000)
    assert (rpn.IOU_THRESHOLDS, rpn.BATCH_SIZE_PER_IMAGE, rpn.POSITIVE_FRACTION) == ([0.3, 0.7], 256, 0.5)
    assert (rpn.BOUNDARY_THRESH, round(rpn.SMOOTH_L1_BETA, 9)) == ((0, round(1 / 9, 9)) if cascade else (-1, 0))
    assert (rpn.BBOX_REG_WEIGHTS, rpn.LOSS_WEIGHT, rpn.CONV_DIMS) == ((1.0,) * 4, 1.0, [-1])
    assert (model.PROPOSAL_GENERATOR.NAME, model.PROPOSAL_GENERATOR.MIN_SIZE) == ("DCNRPN", 0)
    dcn = model.DCN
    assert (dcn.RPN_LOW_QUALITY_IOU, dcn.RPN_PADDING_DIVISOR, dcn.RPN_LOSS_PER_SAMPLE) == (0.3, 32, True)

    heads, box, mask = model.ROI_HEADS, model.ROI_BOX_HEAD, model.ROI_MASK_HEAD
    assert heads.NAME == ("DCNCascadeROIHeads" if cascade else "DCNROIHeads")
    pools = {"dpool": "DeformPSRoIPool", "mdpool": "ModulatedDeformPSRoIPool"}
    assert box.POOLER_TYPE == pools.get(name.rpartition("_")[2], "ROIAlignV2")
    assert (mask.POOLER_TYPE, mask.POOLER_RESOLUTION, mask.POOLER_SAMPLING_RATIO) == ("ROIAlignV2", 14, 0)
    assert (box.POOLER_RESOLUTION, box.POOLER_SAMPLING_RATIO, dcn.POOLER_MMDET_LEVELS) == (7, 0, True)
    assert (box.NUM_FC, box.FC_DIM, box.NUM_CONV, dcn.POOLER_FC_DIM) == (2, 1024, 0, 1024)
    assert (box.CLS_AGNOSTIC_BBOX_REG, box.SMOOTH_L1_BETA) == ((True, 1.0) if cascade else (False, 0.0))
    assert box.BBOX_REG_WEIGHTS == (10.0, 10.0, 5.0, 5.0) and not box.TRAIN_ON_PRED_BOXES
    assert (heads.BATCH_SIZE_PER_IMAGE, heads.POSITIVE_FRACTION, heads.PROPOSAL_APPEND_GT) == (512, 0.25, True)
    assert (heads.IOU_THRESHOLDS, heads.SCORE_THRESH_TEST, heads.NMS_THRESH_TEST) == ([0.5], 0.05, 0.5)
    assert model_zoo.get_config(name).TEST.DETECTIONS_PER_IMAGE == 100
    assert dcn.ROI_LOW_QUALITY_IOU == (0.5 if masks and not cascade else -1)
    assert (mask.NUM_CONV, mask.CONV_DIM, mask.CLS_AGNOSTIC_MASK) == (4, 256, False) or not masks

    stages = model.ROI_BOX_CASCADE_HEAD
    assert (dcn.CASCADE_AVERAGE_LOGITS, dcn.CASCADE_RESAMPLE, dcn.CASCADE_SCALE_GRADIENTS) == (
        *(cascade, cascade),
        not cascade,
    )
    assert dcn.CASCADE_LOSS_WEIGHTS == ((1.0, 0.5, 0.25) if cascade else ())
    assert dcn.CASCADE_MASK_HEADS == (cascade and masks)
    if cascade:
        assert stages.IOUS == (0.5, 0.6, 0.7)
        deviations = [[round(1 / weight, 9) for weight in stage] for stage in stages.BBOX_REG_WEIGHTS]
        assert deviations == [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]


def test_pooling_rows_can_take_the_other_operator() -> None:
    for name in ("dpool", "mdpool"):
        published = build_on_meta(f"faster_rcnn_R_50_FPN_1x_{name}")[1]
        cfg = model_zoo.get_config(f"faster_rcnn_R_50_FPN_1x_{name}")
        cfg.MODEL.DEVICE = "meta"
        cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE.replace("PSRoIPool", "RoIPool")
        with torch.device("meta"):
            other = build_model(cfg)
        assert type(other.roi_heads.box_pooler.level_poolers[0]).__name__ == cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE
        assert [(name, value.shape) for name, value in published.state_dict().items()] == [
            (name, value.shape) for name, value in other.state_dict().items()
        ]


def test_trained_config_has_the_published_weights() -> None:
    url = model_zoo.get_checkpoint_url(ROW)
    assert model_zoo.get_config(ROW, trained=True).MODEL.WEIGHTS == f"mmdet://{url}"
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


def test_the_name_of_a_row_was_no_config_file_for_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, file = "faster_rcnn_R_50_FPN_1x_mdconv_c3-c5", tmp_path / "a.yaml"
    monkeypatch.chdir(tmp_path)
    file.touch()
    assert model_zoo.find_config_file(row) == model_zoo.get_config_file(row)
    assert model_zoo.find_config_file(f"{row}.yaml") == model_zoo.get_config_file(row)
    for as_it_is in ("", "a.yaml", str(file), "https://host/a.yaml"):
        assert model_zoo.find_config_file(as_it_is) == as_it_is
    with pytest.raises(ConfigError, match=f"'configs/{row}.yml' does not exist; did you mean '{row}'"):
        model_zoo.find_config_file(f"configs/{row}.yml")
