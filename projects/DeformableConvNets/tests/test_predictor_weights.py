# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the predictor and Detectron2's own classes make of weights that do not fit, or that are no weights."""

import logging
import os
import pickle
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

import train_net
from dcn_d2 import engine, model_zoo
from dcn_d2.checkpoint import register_path_handlers, to_mmdet
from dcn_d2.engine import DCNPredictor

from .slim import slim_config


def config(**changes: Any) -> CfgNode:
    """A slim deformable detector; the arguments are keys below MODEL, with "__" for the dot."""
    cfg = slim_config(DEFORM_ON_PER_STAGE=[False, True, True, True], DEFORM_MODULATED=True)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    for key, value in changes.items():
        cfg.merge_from_list([f"MODEL.{key.replace('__', '.')}", value])
    return cfg


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_model(config()).state_dict()


class Attack:
    """Makes a folder when it is read as a pickle."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("form", ["pkl", "blobs", "pth", "pyth"])
@pytest.mark.parametrize("door", ["predictor", "demo", "zoo", "train_net"])
def test_no_door_runs_the_code_in_a_file(door: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harm, path = tmp_path / "harm", tmp_path / f"evil.{form.replace('blobs', 'pkl')}"
    data = {"model": {}, "__author__": "me", "evil": Attack(harm)}
    if form == "blobs":
        data = {"blobs": {"conv1_w": Attack(harm)}}
    if form == "pth":
        torch.save(data, path)
    else:
        path.write_bytes(pickle.dumps(data))
    project = Path(train_net.__file__).parent
    slim = str(project / "examples" / "nuclei_faster_rcnn_slim_R_50_FPN_mdconv_c3-c5.yaml")
    cpu = ["MODEL.DEVICE", "cpu"]
    with pytest.raises((ValueError, SystemExit), match="is refused: it holds more than weights, namely posix.mkdir"):
        if door == "predictor":
            DCNPredictor(config(WEIGHTS=str(path)))
        elif door == "zoo":
            monkeypatch.setattr(model_zoo, "get_config", lambda *args: config(WEIGHTS=str(path)))
            model_zoo.get("any", device="cpu")
        elif door == "demo":
            demo = runpy.run_path(str(project / "demo.py"))
            demo["main"](["--config-file", slim, "--weights", str(path), "--output", str(tmp_path / "out"), *cpu])
        else:
            monkeypatch.setattr(engine, "check_data_sets", lambda *args, **kwargs: None)
            options = ["--eval-only", "--config-file", slim, *cpu, "OUTPUT_DIR", str(tmp_path / "out")]
            train_net.run([*options, "MODEL.WEIGHTS", str(path)])
    assert not harm.exists()


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w}, lambda w: {"meta": {}, "state_dict": w}])
def test_predictor_converts_files_of_mmdetection(wrap: Any, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(wrap(to_mmdet(weights)), tmp_path / "theirs.pth")
    predictor = DCNPredictor(config(WEIGHTS=str(tmp_path / "theirs.pth")))
    for name, value in predictor.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert predictor.cfg.MODEL.WEIGHTS == str(tmp_path / "theirs.pth")


@pytest.mark.parametrize(
    "change, entry",
    [
        ({"ROI_HEADS__NUM_CLASSES": 2}, r"cls_score.weight is \[6, 32\], the model's is \[3, 32\]"),
        ({"RESNETS__DEFORM_MODULATED": False}, r"conv2_offset.weight is \[27, .*the model's is \[18, "),
        ({"RESNETS__DEFORM_NUM_GROUPS": 2}, r"conv2_offset.weight is \[27, .*the model's is \[54, "),
        ({"RESNETS__DEFORM_ON_PER_STAGE": [False] * 4}, "conv2_offset.weight is unknown"),
        ({"RESNETS__DEFORM_ON_PER_STAGE": [True] * 4}, "res2.0.conv2_offset.weight is missing"),
        ({"FPN__OUT_CHANNELS": 16}, r"fpn_lateral2.weight is \[32, .*the model's is \[16, "),
    ],
)
def test_predictor_refuses_weights_of_another_model(
    change: dict, entry: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save({"model": weights}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=rf"model.pth does not fit the model \(\d+ entries\):(?s:.*){entry}"):
        DCNPredictor(config(WEIGHTS=str(tmp_path / "model.pth"), **change))


def resnet_alone(weights: dict[str, torch.Tensor], path: Path) -> str:
    prefix = "backbone.bottom_up."
    arrays = {
        name.removeprefix(prefix): value.numpy()
        for name, value in weights.items()
        if name.startswith(prefix) and "offset" not in name
    }
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "torchvision", "matching_heuristics": True}))
    return str(path)


@pytest.mark.parametrize("given", ["nothing", "ImageNet"])
def test_untrained_heads_predict_and_are_evaluated_only_on_request(
    given: str, weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = resnet_alone(weights, tmp_path / "R-50.pkl") if given == "ImageNet" else ""
    with pytest.raises(ValueError, match="the heads are not trained: .*MODEL.WEIGHTS output/model_final.pth"):
        DCNPredictor(config(WEIGHTS=path))
    DCNPredictor(config(WEIGHTS=path), untrained=True)

    yaml = tmp_path / "config.yaml"
    yaml.write_text(config(WEIGHTS=path, DEVICE="cpu").dump())
    monkeypatch.setattr(engine.DCNTrainer, "test", lambda *args: pytest.fail("an untrained model was evaluated"))
    with pytest.raises(SystemExit, match=r"train_net.py: .*the heads are not trained: .*MODEL.WEIGHTS"):
        train_net.run(
            [
                "--eval-only",
                "--config-file",
                str(yaml),
                "OUTPUT_DIR",
                str(tmp_path / "out"),
                "DATASETS.TEST",
                "('nuclei_val',)",
            ]
        )


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w}, lambda w: {"meta": {}, "state_dict": w}])
@pytest.mark.parametrize(
    "door", [DefaultPredictor, lambda cfg: DetectionCheckpointer(build_model(cfg)).load(cfg.MODEL.WEIGHTS)]
)
def test_detectron2_says_how_files_of_mmdetection_are_converted(
    wrap: Any, door: Any, weights: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(wrap(to_mmdet(weights)), tmp_path / "theirs.pth")
    register_path_handlers()
    register_path_handlers()
    try:
        door(config(WEIGHTS=str(tmp_path / "theirs.pth")))
    except ValueError as error:  # Detectron2's, below "state_dict"
        assert "Unsupported type" in str(error)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert f"MODEL.WEIGHTS mmdet://{tmp_path}/theirs.pth" in line


def test_detectron2_stays_silent_about_its_own_files(
    weights: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": weights}, tmp_path / "mine.pth")
    DefaultPredictor(config(WEIGHTS=str(tmp_path / "mine.pth")))
    DefaultPredictor(config(WEIGHTS=resnet_alone(weights, tmp_path / "R-50.pkl")))
    torch.save({1: torch.zeros(1)}, tmp_path / "odd.pth")
    with pytest.raises(Exception):  # noqa: B017  Detectron2's own
        DefaultPredictor(config(WEIGHTS=str(tmp_path / "odd.pth")))
    assert not [record for record in caplog.records if "mmdet://" in record.getMessage()]
    assert sys.exc_info() == (None, None, None)
