# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from dcn_d2 import add_dcn_config
from dcn_d2.checkpoint import DCNCheckpointer, checkpointer, to_mmdet

from ..slim import SLIM, slim_config

BATCHES = "num_batches_tracked"


def build(**changes: Any) -> nn.Module:
    """A slim deformable detector; the arguments are keys below MODEL, with "__" for the dot."""
    cfg = slim_config(DEFORM_ON_PER_STAGE=[False, True, True, True], DEFORM_MODULATED=True)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    for key, value in changes.items():
        cfg.merge_from_list([f"MODEL.{key.replace('__', '.')}", value])
    torch.manual_seed(len(changes))
    return build_model(cfg)


def assert_same(first: nn.Module, second: nn.Module, atol: float = 0) -> None:
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=atol, msg=name)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def source() -> nn.Module:
    model = build()
    torch.manual_seed(0)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value += 0.1 * torch.rand_like(value)
    return model


@pytest.mark.parametrize(
    "content",
    [
        lambda weights: {"model": weights, "optimizer": {"state": {}}, "iteration": 7},
        lambda weights: weights,
        lambda weights: {f"module.{name}": value for name, value in weights.items()},
        lambda weights: {"meta": {}, "state_dict": to_mmdet(weights)},
        lambda weights: {name: value for name, value in to_mmdet(weights).items() if BATCHES not in name},
    ],
    ids=["own", "bare", "distributed", "mmdet", "mmdet, bare"],
)
def test_files_are_recognised_by_content(
    source: nn.Module, content: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(content(source.state_dict()), tmp_path / "model.pth")
    model = build()
    rest = DCNCheckpointer(model).load(str(tmp_path / "model.pth"))
    assert_same(source, model)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert rest.get("iteration") == (7 if rest.get("optimizer") else None)


@pytest.mark.parametrize("modulated, folded", [(False, False), (True, False), (False, True)])
def test_deformable_models_of_detectron2_load_unchanged(modulated: bool, folded: bool, tmp_path: Path) -> None:
    """A pickle of arrays as in its zoo, into its own backbone and ours: the names are the same.

    The oldest ones have norms without statistics.
    """
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, True, True, True]
    cfg.MODEL.RESNETS.DEFORM_MODULATED = modulated
    cfg = stock_heads(cfg)
    theirs = build_model(cfg)
    left_out = ("running_mean", "running_var") if folded else ()
    arrays = {name: value.numpy() for name, value in theirs.state_dict().items() if not name.endswith(left_out)}
    for buffer in ("pixel_mean", "proposal_generator.anchor_generator.cell_anchors.0"):  # as older versions saved them
        arrays[buffer] = arrays["backbone.fpn_lateral2.bias"]
    data = {"model": arrays, "__author__": "Detectron2 Model Zoo"}
    (tmp_path / "model_final_821d0b.pkl").write_bytes(pickle.dumps(data))
    for backbone in ("build_resnet_fpn_backbone", "build_dcn_resnet_fpn_backbone"):
        cfg.MODEL.BACKBONE.NAME = backbone
        model = build_model(cfg)
        DCNCheckpointer(model).load(str(tmp_path / "model_final_821d0b.pkl"))
        # Detectron2 takes 1 for a variance that is missing, its layer starts with 1 - 1e-5.
        assert_same(theirs, model, atol=1.1e-5 if folded else 0)


def test_pickle_with_code_is_refused(source: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": {}, "__author__": print}))
    with pytest.raises(ValueError, match="model.pkl is refused: it holds more than weights, namely builtins.print"):
        DCNCheckpointer(source).load(str(tmp_path / "model.pkl"))


def stock_heads(cfg: CfgNode) -> CfgNode:
    slim = slim_config()
    for key in ("FPN", "RPN", "ROI_HEADS", "ROI_BOX_HEAD"):
        cfg.MODEL[key] = slim.MODEL[key]
    cfg.MODEL.RESNETS.OUT_FEATURES = slim.MODEL.RESNETS.OUT_FEATURES
    cfg.MODEL.ROI_MASK_HEAD.NAME, cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = "MaskRCNNConvUpsampleHead", 4
    cfg.merge_from_list(SLIM)
    return cfg


def test_everything_that_does_not_fit_is_listed_and_nothing_loaded(source: nn.Module, tmp_path: Path) -> None:
    weights = source.state_dict()
    weights["roi_heads.box_predictor.cls_score.bias"] = torch.zeros(9)
    weights["surplus.weight"] = weights["surplus\x1b[2J\n.weight"] = torch.zeros(1)  # a terminal would obey the second
    del weights["backbone.bottom_up.res2.0.conv1.norm.running_mean"], weights["backbone.fpn_output3.weight"]
    path = tmp_path / "model.pth"
    torch.save({"model": weights}, path)
    model = build()
    before = state(model)
    own = DCNCheckpointer(model)
    for _ in range(2):  # Detectron2's checkpointer cannot be used again after an error
        with pytest.raises(ValueError) as error:
            own.load(str(path))
    assert str(error.value).splitlines() == [
        f"{path} does not fit the model (5 entries):",
        "  backbone.fpn_output3.weight is missing",
        "  backbone.bottom_up.res2.0.conv1.norm.running_mean is missing",
        "  roi_heads.box_predictor.cls_score.bias is [9], the model's is [6]",
        "  surplus.weight is unknown",
        r"  surplus\x1b[2J\n.weight is unknown",
    ]
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)


def test_fine_tuning_with_other_classes_keeps_what_fits(
    source: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"state_dict": to_mmdet(source.state_dict())}, tmp_path / "model.pth")
    changes = {"ROI_HEADS__NUM_CLASSES": 2, "RESNETS__DEFORM_NUM_GROUPS": 2}
    model = build(**changes)
    before = state(model)
    with pytest.raises(ValueError, match=r"cls_score.weight is \[6, 32\], the model's is \[3, 32\]"):
        DCNCheckpointer(model).load(str(tmp_path / "model.pth"))
    DCNCheckpointer(model, fine_tune=True).resume_or_load(str(tmp_path / "model.pth"), resume=False)
    classifier, boxes, warning = [text for text in caplog.messages if text.startswith("fine-tuning")]
    assert "the classifier of boxes is replaced, from 5 classes to 2: roi_heads.box_predictor.cls_score" in classifier
    assert "the refinement of boxes is replaced, from 5 classes to 2: roi_heads.box_predictor.bbox_pred" in boxes
    afresh = {line.split()[0] for line in warning.splitlines()[1:]}
    assert {name.split(".")[-2] for name in afresh} == {"cls_score", "bbox_pred", "conv2_offset"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in afresh else source.state_dict()[name]), name


def test_fine_tuning_needs_the_backbone(source: nn.Module, tmp_path: Path) -> None:
    weights = source.state_dict()
    del weights["backbone.bottom_up.res4.1.conv2.weight"], weights["backbone.bottom_up.res4.1.conv2_offset.weight"]
    torch.save(weights, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"\(1 entries\):\n  backbone.bottom_up.res4.1.conv2.weight is missing$"):
        DCNCheckpointer(build(), fine_tune=True).load(str(tmp_path / "model.pth"))


STEM = "backbone.bottom_up.stem.conv1.weight"
GREY: dict[str, Any] = {"PIXEL_MEAN": [30.0], "PIXEL_STD": [20.0]}


@pytest.mark.parametrize("kind", ["detector", "ResNet"])
def test_grey_images_could_not_be_learnt_from_weights_for_colour(
    source: nn.Module, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = source.state_dict()
    if kind == "ResNet":
        prefix = "backbone.bottom_up."
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    torch.save({"model": weights}, tmp_path / "model.pth")
    model = build(**GREY)
    before = state(model)
    with pytest.raises(ValueError, match=rf"{STEM} is \[32, 3, 7, 7\], the model's is \[32, 1, 7, 7\]"):
        DCNCheckpointer(model).load(str(tmp_path / "model.pth"))
    own = DCNCheckpointer(model, fine_tune=True)
    own.load(str(tmp_path / "model.pth"))
    assert torch.equal(model.state_dict()[STEM], before[STEM]) and STEM in own.initial
    res2 = "backbone.bottom_up.res2.0.conv1.weight"
    assert torch.equal(model.state_dict()[res2], source.state_dict()[res2])
    assert [text for text in caplog.messages if text.startswith("fine-tuning") and STEM in text]


def test_stem_that_starts_afresh_is_not_frozen(source: nn.Module, tmp_path: Path) -> None:
    torch.save(source.state_dict(), tmp_path / "model.pth")
    model = build(**GREY, BACKBONE__FREEZE_AT=1)
    with pytest.raises(ValueError, match="frozen: set MODEL.BACKBONE.FREEZE_AT to 0, or take images of 3 channel"):
        DCNCheckpointer(model, fine_tune=True).load(str(tmp_path / "model.pth"))


def test_retinanet_could_not_start_from_a_model_without_p6_and_p7(source: nn.Module, tmp_path: Path) -> None:
    torch.save(source.state_dict(), tmp_path / "model.pth")
    levels = ["res3", "res4", "res5"]
    model = build(
        META_ARCHITECTURE="RetinaNet",
        BACKBONE__NAME="build_dcn_retinanet_resnet_fpn_backbone",
        RESNETS__OUT_FEATURES=levels,
        FPN__IN_FEATURES=levels,
    )
    own = DCNCheckpointer(model, fine_tune=True)
    own.load(str(tmp_path / "model.pth"))
    assert "backbone.top_block.p6.weight" in own.initial and STEM not in own.initial


def test_resuming_is_exact_even_when_fine_tuning(source: nn.Module, tmp_path: Path) -> None:
    DCNCheckpointer(source, str(tmp_path)).save("model_0000001", iteration=1)
    own = DCNCheckpointer(build(ROI_HEADS__NUM_CLASSES=2), str(tmp_path), fine_tune=True)
    with pytest.raises(ValueError, match="model_0000001.pth does not fit"):
        own.resume_or_load("", resume=True)
    assert own.fine_tune
    model = build()
    assert DCNCheckpointer(model, str(tmp_path), fine_tune=True).resume_or_load("", resume=True)["iteration"] == 1
    assert_same(source, model)


def test_interrupted_save_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 3)
    own = DCNCheckpointer(model, str(tmp_path), optimizer=torch.optim.SGD(model.parameters(), 0.1))
    own.save("model", iteration=1)
    old = (tmp_path / "model.pth").read_bytes()
    original = torch.save

    def save_half(data: dict, file: Any) -> None:
        original(data, file)
        file.truncate(100)
        raise OSError("disk full")

    monkeypatch.setattr(checkpointer.torch, "save", save_half)
    with pytest.raises(OSError, match="disk full"):
        own.save("model", iteration=2)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model.pth"]
    assert (tmp_path / "model.pth").read_bytes() == old
    assert own.get_checkpoint_file() == str(tmp_path / "model.pth")
    saved = torch.load(tmp_path / "model.pth")
    assert saved.keys() == {"model", "optimizer", "iteration"}
    DCNCheckpointer(model, "").save("nowhere")
    DCNCheckpointer(model, str(tmp_path), save_to_disk=False).save("nowhere")
    assert len(os.listdir(tmp_path)) == 2


def test_imagenet_weights_tell_what_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefix = "backbone.bottom_up."
    model = build()
    resnet = {
        name.removeprefix(prefix): value.numpy()
        for name, value in model.state_dict().items()
        if name.startswith(prefix) and "conv2_offset" not in name
    }
    data = {"model": resnet | {"stem.fc.bias": resnet["stem.conv1.norm.bias"]}, "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(data | {"__author__": "torchvision"}))
    caplog.set_level(logging.INFO)
    DCNCheckpointer(model).load(str(tmp_path / "R-50.pkl"))
    assert re.search(r"R-50.pkl holds a ResNet: the model's \d+ other entries keep their initial values", caplog.text)
    del resnet["res5.2.conv3.weight"]
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(data | {"model": resnet, "__author__": "torchvision"}))
    with pytest.raises(ValueError, match="bottom_up.res5.2.conv3.weight is missing"):
        DCNCheckpointer(model).load(str(tmp_path / "R-50.pkl"))


def test_weights_of_which_nothing_fits_do_not_start_a_training(source: nn.Module, tmp_path: Path) -> None:
    weights = {f"x{number}.weight": torch.ones(number, 2, 3) for number in (1, 2)}
    torch.save({"model": weights, "matching_heuristics": True}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="none of its 2 entries, such as x1.weight, has a place in it"):
        DCNCheckpointer(build(), fine_tune=True).load(str(tmp_path / "other.pth"))


def test_name_that_the_catalogue_does_not_have_is_a_mistake_of_the_user(source: nn.Module) -> None:
    with pytest.raises(ValueError, match="catalog://nosuch cannot be fetched: model not present in the catalog"):
        DCNCheckpointer(source).load("catalog://nosuch")
