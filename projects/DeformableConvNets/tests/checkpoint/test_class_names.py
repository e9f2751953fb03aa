# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Weights know how their classes are called, and fine-tuning says which heads it replaces."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn

from dcn_d2 import model_zoo
from dcn_d2.checkpoint import DCNCheckpointer, read_weights, to_mmdet
from dcn_d2.checkpoint.class_names import check_class_names, describe_fine_tuning, peek_class_names
from dcn_d2.checkpoint.provenance import read_class_names
from dcn_d2.config import load_config

from ..slim import slim_config

ROI = "roi_heads.box_predictor"


def build(name: str, classes: int, **changes: Any) -> nn.Module:
    """A slim model of a row of the zoo, or of Detectron2's RetinaNet, with another number of classes."""
    if name == "retinanet":
        from detectron2.model_zoo import get_config_file

        cfg = slim_config(load_config(get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")))
        cfg.MODEL.RETINANET.NUM_CLASSES = classes
    else:
        cfg = slim_config(model_zoo.get_config(name))
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    for key, value in changes.items():
        cfg.merge_from_list([f"MODEL.{key.replace('__', '.')}", value])
    return build_model(cfg)


FASTER, MASK = "faster_rcnn_R_50_FPN_1x_mdconv_c3-c5", "mask_rcnn_R_50_FPN_1x_dconv_c3-c5"
CASCADE_MASK = "cascade_mask_rcnn_R_50_FPN_1x_dconv_c3-c5"
KEYPOINTS = {"KEYPOINT_ON": True, "ROI_KEYPOINT_HEAD__CONV_DIMS": [8]}
AGNOSTIC = {"ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True}
BOXES = f"the classifier of boxes is replaced, from 7 classes to 3: {ROI}.cls_score.weight, {ROI}.cls_score.bias"
REFINED = f"the refinement of boxes is replaced, from 7 classes to 3: {ROI}.bbox_pred.weight, {ROI}.bbox_pred.bias"


@pytest.mark.parametrize(
    "name, before, after, told",
    [
        (FASTER, {}, {}, [BOXES, REFINED]),
        (FASTER, AGNOSTIC, AGNOSTIC, [BOXES]),
        (FASTER, {}, AGNOSTIC, [BOXES, REFINED.replace("to 3", "to 1")]),
        (
            MASK,
            {},
            {},
            [
                BOXES,
                REFINED,
                "the head of masks is replaced, from 7 classes to 3: roi_heads.mask_head.predictor.weight",
            ],
        ),
        (
            CASCADE_MASK,
            {},
            {},
            [
                "the classifier of boxes is replaced, from 7 classes to 3: "
                + ", ".join(f"{ROI}.{stage}.cls_score.{kind}" for stage in range(3) for kind in ("weight", "bias")),
                "the head of masks is replaced, from 7 classes to 3: roi_heads.mask_head.0.predictor.weight, "
                "roi_heads.mask_head.0.predictor.bias, roi_heads.mask_head.1.predictor.weight",
            ],
        ),
        (
            FASTER,
            KEYPOINTS,
            KEYPOINTS | {"ROI_KEYPOINT_HEAD__NUM_KEYPOINTS": 4},
            [
                BOXES,
                REFINED,
                "the head of keypoints is replaced, from 17 keypoints to 4: "
                "roi_heads.keypoint_head.score_lowres.weight, roi_heads.keypoint_head.score_lowres.bias",
            ],
        ),
        (
            "retinanet",
            {},
            {},
            ["the classifier of RetinaNet is replaced, from 7 classes to 3: head.cls_score.weight, head.cls_score."],
        ),
    ],
)
def test_the_log_says_which_heads_are_replaced(
    name: str, before: dict, after: dict, told: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    DCNCheckpointer(build(name, 7, **before), str(tmp_path)).save("old")
    model = build(name, 3, **after)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    checkpointer = DCNCheckpointer(model, fine_tune=True)
    checkpointer.load(str(tmp_path / "old.pth"))
    lines = [text.partition("old.pth: ")[2] for text in caplog.messages if "is replaced, from" in text]
    assert len(lines) == len(told)
    for line, expected in zip(lines, told):
        assert line.startswith(expected)
        for entry in line.partition(": ")[2].split(", "):  # and so they are
            assert entry in checkpointer.initial and torch.equal(model.state_dict()[entry], initial[entry])
    assert {part for line in lines for part in line.partition(": ")[2].split(", ")} == set(checkpointer.initial)


def test_a_checkpoint_knows_its_classes(tmp_path: Path) -> None:
    model = build(FASTER, 2)
    saved = DCNCheckpointer(model, str(tmp_path), class_names=["cat", "dog"])
    saved.save("model")
    path = str(tmp_path / "model.pth")
    assert peek_class_names(path) == ("cat", "dog") and peek_class_names("") == ()
    loaded = DCNCheckpointer(build(FASTER, 2))
    loaded.load(path)
    assert loaded.trained_names == ("cat", "dog")
    loaded.load("")
    assert loaded.trained_names == ()
    DetectionCheckpointer(build(FASTER, 2)).load(path)  # Detectron2's own reads the file as before
    DCNCheckpointer(model, str(tmp_path)).save("unnamed")
    assert "class_names" not in torch.load(tmp_path / "unnamed.pth")


def test_only_the_same_classes_are_resumed(tmp_path: Path) -> None:
    DCNCheckpointer(build(FASTER, 2), str(tmp_path), class_names=["cat", "dog"]).save("model")
    for names in (["dog", "cat"], ["cat", "hound"]):
        run = DCNCheckpointer(build(FASTER, 2), str(tmp_path), class_names=names, fine_tune=True)
        with pytest.raises(ValueError, match="goes on only with the classes it began with"):
            run.resume_or_load("", resume=True)
    DCNCheckpointer(build(FASTER, 2), str(tmp_path), class_names=["cat", "dog"], fine_tune=True).resume_or_load("")


@pytest.mark.parametrize(
    "rest", [{"meta": {"CLASSES": ("cat", "dog")}}, {"meta": {"dataset_meta": {"classes": ["cat", "dog"]}}}]
)
def test_detectors_of_mmdetection_know_theirs(
    rest: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"state_dict": to_mmdet(build(FASTER, 2).state_dict())} | rest, tmp_path / "theirs.pth")
    assert read_weights(str(tmp_path / "theirs.pth"))["class_names"] == ["cat", "dog"]
    assert peek_class_names(str(tmp_path / "theirs.pth")) == ("cat", "dog")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    assert peek_class_names(f"mmdet://{tmp_path / 'theirs.pth'}") == ("cat", "dog")  # the converted file


@pytest.mark.parametrize("meta", [None, [], {"CLASSES": "cat"}, {"CLASSES": [1]}, {"dataset_meta": None}])
def test_what_is_not_a_list_of_names_is_none(meta: Any) -> None:
    assert read_class_names({"meta": meta, "class_names": 3}) == ()


def test_classes_of_another_number_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    check_class_names(["a", "b"], [], "w.pth", resume=False)
    with pytest.raises(
        ValueError, match="w.pth is of .* the classes a, b, but here .* b, a: b is class 1 there, class 0"
    ):
        check_class_names(["b", "a"], ["a", "b"], "w.pth", resume=False)
    assert not caplog.messages
    check_class_names(["traffic light"], ["traffic_light"], "w.pth", resume=False)
    assert "Classes count by their place" in caplog.text


@pytest.mark.parametrize(
    "ours, theirs, told",
    [
        (["a"], [], ""),
        (["a", "b"], ["a", "b"], ""),
        (["x"], ["a", "b"], ""),
        (["b"], ["a", "b"], "all 1 classes are among its 2 (b); the classifiers learn them anew"),
        (["b", "x", "y"], ["a", "b"], "of the 3 classes, its 2 have b; the classifiers learn all anew"),
        (["b", "a"], ["a", "b"], "the classifiers start from those classes, place by place"),
    ],
)
def test_fine_tuning_says_which_classes_are_known(ours: list[str], theirs: list[str], told: str) -> None:
    said = describe_fine_tuning(ours, theirs)
    assert told in said and bool(told) == bool(said)
