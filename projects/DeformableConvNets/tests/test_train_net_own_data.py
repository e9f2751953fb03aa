# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""train_net.py with data of the user's own: --train-json and what belongs to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from dcn_d2.checkpoint import DCNCheckpointer, read_checkpoint
from dcn_d2.command_line.train import parse_arguments
from dcn_d2.engine import DCNPredictor, load_config

from .data.own_files import CATEGORIES, write_own
from .engine.tiny import tiny_config

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
import train_net  # noqa: E402  it is a script, not part of the package

OTHER_ORDER = [(2, "bird"), (3, "cat"), (4, "dog")]
NAMES = ["cat", "dog", "bird"]
ROW = ["DATASETS.TRAIN", ("coco_2017_train",), "DATASETS.TEST", ("coco_2017_val",), "MODEL.ROI_HEADS.NUM_CLASSES", 80]
ROW += ["SOLVER.MAX_ITER", 87960, "SOLVER.STEPS", (58640, 80630), "SOLVER.IMS_PER_BATCH", 2]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config like that of a row, and two data sets whose categories are in another order."""
    (tmp_path / "row.yaml").write_text(tiny_config(tmp_path / "out", *ROW).dump())
    write_own(tmp_path / "my data", "a", CATEGORIES, 6)
    write_own(tmp_path / "my data", "b", OTHER_ORDER, 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = ["--train-json", "my data/a.json", "--train-images", "my data"]
TEST = ["--test-json", "my data/b.json", "--test-images", "my data"]


def read_job(*arguments: Any) -> tuple[Any, CfgNode]:
    args = parse_arguments(["--config-file", "row.yaml", *map(str, arguments)])
    return args, train_net.read_job(args)


def refused(*arguments: Any) -> str:
    """What the command says when it refuses its arguments or data."""
    try:
        train_net.run([*([] if "--config-file" in arguments else ["--config-file", "row.yaml"]), *map(str, arguments)])
    except SystemExit as end:
        assert end.code, "it was not refused"
        return str(end.code)
    raise AssertionError("it was not refused")


def command(folder: Path, *arguments: Any) -> str:
    """Runs train_net.py as a user does."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("DETECTRON2_DATASETS", None)
    line = [sys.executable, str(PROJECT / "train_net.py"), *map(str, arguments)]
    done = subprocess.run(
        line, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.mark.slow
def test_trains_in_two_processes_and_evaluates_again_without_naming_the_data(work: Path) -> None:
    torch.manual_seed(0)
    coco = tiny_config(work / "coco", "MODEL.ROI_HEADS.NUM_CLASSES", 80)
    DCNCheckpointer(build_model(coco), str(work), class_names=[*NAMES, *map(str, range(77))]).save("coco_model")
    options = ["--config-file", "row.yaml", *TRAIN, *TEST, "--epochs", 2, "--num-gpus", 2]
    log = command(work, *options, "OUTPUT_DIR", "mine", "MODEL.WEIGHTS", "coco_model.pth")
    assert "6 images, 18 objects of 3 classes: cat, dog, bird" in log
    assert "MODEL.ROI_HEADS.NUM_CLASSES goes from 80 to 3" in log
    assert "it lists its categories in another order than the training: they are matched by name" in log
    assert "2 epochs of 6 images, 2 at a time: SOLVER.MAX_ITER 6, SOLVER.STEPS (4,)" in log
    assert "all 3 classes are among its 80 (cat, dog, bird); the classifiers learn them anew" in log
    assert "the classifier of boxes is replaced, from 80 classes to 3: roi_heads.box_predictor.cls_score.weight" in log
    assert re.search(r"\| bird +\|[^|]*\| cat +\|[^|]*\| dog", log)  # by the file's order
    saved = yaml.safe_load((work / "mine" / "config.yaml").read_text())
    assert saved["DATASETS"]["CLASS_NAMES"] == NAMES and saved["MODEL"]["RETINANET"]["NUM_CLASSES"] == 3
    assert [entry[1:] for entry in saved["DATASETS"]["OWN"]] == [
        [str(work / "my data" / f"{stem}.json"), str(work / "my data")] for stem in "ab"
    ]
    assert read_checkpoint(work / "mine" / "model_final.pth")["class_names"] == NAMES

    (work / "elsewhere").mkdir()
    config = ["--config-file", work / "mine" / "config.yaml", "MODEL.WEIGHTS", work / "mine" / "model_final.pth"]
    log = command(work / "elsewhere", "--eval-only", *config)
    assert re.search(r"\| bird +\|[^|]*\| cat +\|[^|]*\| dog", log)
    shutil.rmtree(work / "my data")
    told = refused("--eval-only", *config[:1], *config[1:])
    assert "b.json, which does not exist. The config names it in DATASETS.OWN" in told and "DETECTRON2" not in told


def test_evaluates_on_another_file_and_predicts_names_without_the_data(work: Path) -> None:
    train_net.run(["--config-file", "row.yaml", *TRAIN, *TEST, "OUTPUT_DIR", "mine", "SOLVER.MAX_ITER", "2"])
    assert yaml.safe_load((work / "mine" / "config.yaml").read_text())["SOLVER"]["MAX_ITER"] == 2
    write_own(work / "more", "c", [(4, "dog"), (9, "cat")], 2)
    other = ["--test-json", "more/c.json", "--test-images", "more", "MODEL.WEIGHTS", "mine/model_final.pth"]
    config = str(work / "mine" / "config.yaml")
    train_net.run(["--eval-only", "--config-file", config, *other])
    (folder,) = (work / "mine" / "inference").glob("c_*")
    found = json.loads((folder / "coco_instances_results.json").read_text())
    assert {4, 9} <= {entry["category_id"] for entry in found} and {entry["image_id"] for entry in found} <= {1, 2}
    # The row's config and the weights alone: these know what their classes are called.
    args = parse_arguments(["--eval-only", "--config-file", "row.yaml", *other])
    cfg = train_net.read_job(args)
    assert list(cfg.DATASETS.CLASS_NAMES) == NAMES and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3

    shutil.rmtree(work / "my data")
    image = np.full((64, 80, 3), 90, np.uint8)
    for cfg in (load_config(config), load_config("row.yaml", ["MODEL.ROI_HEADS.NUM_CLASSES", 3])):
        cfg.MODEL.WEIGHTS = "mine/model_final.pth"
        predictor = DCNPredictor(cfg)
        assert predictor.class_names == NAMES and predictor.metadata.thing_classes == NAMES
        assert set(predictor(image)["instances"].pred_classes.tolist()) <= {0, 1, 2}
    cfg = load_config(config, ["DATASETS.CLASS_NAMES", ("dog", "cat", "bird"), "DATASETS.OWN", (), "DATASETS.TEST", ()])
    cfg.MODEL.WEIGHTS = "mine/model_final.pth"
    with pytest.raises(
        ValueError, match="dog is class 1 there, class 0 here, and a model knows classes by their numbers"
    ):
        DCNPredictor(cfg)


def test_a_run_does_not_go_on_with_data_of_other_classes(work: Path) -> None:
    train_net.run(["--config-file", "row.yaml", *TRAIN, "OUTPUT_DIR", "mine", "SOLVER.MAX_ITER", "1"])
    turned = ["--train-json", "my data/b.json", "--train-images", "my data", "--resume"]
    told = refused(*turned, "OUTPUT_DIR", "mine", "SOLVER.MAX_ITER", 3)
    assert "is of a model with the classes cat, dog, bird, but here the classes are bird, cat, dog" in told
    train_net.run(["--config-file", "mine/config.yaml", "--resume", "SOLVER.MAX_ITER", "2"])
    assert torch.load(work / "mine" / "model_final.pth")["iteration"] == 1


def test_one_file_is_split(work: Path) -> None:
    args, cfg = read_job(*TRAIN, "--split", 0.7, "OUTPUT_DIR", "mine")
    assert any("--split 0.7: 4 images for training, 2 for tests" in note for note in args.notes)
    files = [work / "mine" / "data" / f"{part}.json" for part in ("train", "test")]
    assert [entry[1:] for entry in cfg.DATASETS.OWN] == [[str(file), str(work / "my data")] for file in files]
    before = [file.read_bytes() for file in files]
    read_job(*TRAIN, "--split", 0.7, "--resume", "OUTPUT_DIR", "mine")
    assert [file.read_bytes() for file in files] == before
    with pytest.raises(ValueError, match="so that images of the training would be in the test"):
        read_job(*TRAIN, "--split", 0.5, "--resume", "OUTPUT_DIR", "mine")
    assert [file.read_bytes() for file in files] == before


def test_several_files_train_together(work: Path) -> None:
    second = ["--train-json", "my data/b.json"]
    _, cfg = read_job(*TRAIN, *second)  # one folder for both
    assert [Path(entry[1]).stem for entry in cfg.DATASETS.OWN] == ["a", "b"] and len(cfg.DATASETS.TRAIN) == 2
    assert cfg.DATASETS.TEST == ()
    shutil.copytree(work / "my data", work / "copy")
    with pytest.raises(
        ValueError, match=r"6 images such as .* would be in more than one of them. Give a folder for each"
    ):
        read_job(*TRAIN, "--train-json", "copy/a.json")
    args, _ = read_job(*TRAIN, "--test-json", "my data/a.json", "--test-images", "my data")
    assert any(note.startswith("6 images are both for training and for tests") for note in args.notes)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--train-json", "no.json", "--train-images", "my data"], r"--train-json: there is no file /.*/no.json$"),
        (["--train-json", "my data/a.json", "--train-images", "no"], r"--train-images: there is no folder /.*/no$"),
        (["--train-json", "my data", "--train-images", "my data"], r"no file /.*/my data; it is a folder$"),
        (["--train-json", "my data/a.json"], "--train-json needs --train-images FOLDER"),
        (["--test-images", "my data"], "--test-images needs --test-json FILE"),
        ([*TRAIN, *TRAIN, "--train-json", "my data/a.json"], "2 folders for 3 files of --train-json"),
        ([*TRAIN, *TEST, "--split", "0.8"], "--split divides one file"),
        ([*TRAIN, "--split", "80"], "--split must be above 0 and below 1, got 80"),
        ([*TRAIN, "--epochs", "0"], "--epochs must be a number above 0, got 0"),
        ([*TRAIN, "--epochs", "nan"], "--epochs must be a number above 0, got nan"),
        (["--epochs", "2"], "--epochs counts the images of --train-json"),
        ([*TRAIN, "--epochs", "2", "SOLVER.MAX_ITER", "5"], "--epochs sets SOLVER.MAX_ITER: leave one of them out"),
        ([*TRAIN, "DATASETS.TRAIN", "('x',)"], "DATASETS.TRAIN follows from --train-json: leave it out"),
        (["--eval-only", *TEST, "DATASETS.TEST", "('x',)"], "DATASETS.TEST follows from --test-json: leave it out"),
        ([*TEST, "--published"], "--published evaluates on COCO"),
        ([*TRAIN, "--from-published", "MODEL.WEIGHTS", "x"], "--from-published chooses the weights"),
    ],
)
def test_arguments_that_cannot_work(
    arguments: list[str], told: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--config-file", "row.yaml", *arguments])
    assert re.search(f"error: .*{told}", capsys.readouterr().err.strip())


@pytest.mark.parametrize(
    "arguments, told",
    [
        (
            [*TRAIN, "MODEL.ROI_HEADS.NUM_CLASSES", 5],
            "NUM_CLASSES is 5 on the command line, but the data have 3 classes",
        ),
        (
            [*TRAIN, "MODEL.ROI_HEADS.NUM_CLASSES", 2],
            "NUM_CLASSES is 2 on the command line, but the data have 3 classes",
        ),
        (TEST, "--test-json alone is for --eval-only"),
        (["--eval-only", *TEST, "MODEL.ROI_HEADS.NUM_CLASSES", 7], "has objects of|say how their classes are called"),
        ([*TRAIN, "--from-published"], "--from-published: the config 'row.yaml' has no PUBLISHED.WEIGHTS"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_runs(work: Path, arguments: list[Any], told: str) -> None:
    assert re.search(told, refused(*arguments, "OUTPUT_DIR", "mine"))
    assert not (work / "mine").exists()


def test_a_home_folder_is_replaced_and_links_are_kept(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(work))
    args = parse_arguments(
        ["--config-file", "row.yaml", "--train-json", "~/my data/a.json", "--train-images", "~/my data"]
    )
    assert args.train_json == [str(work / "my data" / "a.json")] and args.train_images == [str(work / "my data")]


def test_a_row_starts_from_its_published_weights(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    monkeypatch.setattr("dcn_d2.engine.own_data.PathManager.get_local_path", lambda path: fetched.append(path))
    published = work / "published.pth"
    published.touch()
    args, cfg = read_job(*TRAIN, "--from-published", "PUBLISHED.WEIGHTS", published, "OUTPUT_DIR", "mine")
    assert cfg.MODEL.WEIGHTS == f"mmdet://{published}" and fetched == [cfg.MODEL.WEIGHTS]
    assert any(note.startswith("--from-published: training starts from mmdet://") for note in args.notes)


def test_keypoints_come_with_the_file(work: Path, make_keypoints: Callable[..., None]) -> None:
    make_keypoints(sigmas=[0.1, 0.2])
    on = ["MODEL.KEYPOINT_ON", True, "OUTPUT_DIR", "mine"]
    args, cfg = read_job(*TRAIN, "--split", 0.5, *on)
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 2 and list(cfg.TEST.KEYPOINT_OKS_SIGMAS) == [0.1, 0.2]
    assert cfg.DATASETS.KEYPOINT_FLIP_MAP == [["left_ear", "right_ear"]]
    assert any("in a mirror change places: left_ear and right_ear" in note for note in args.notes)
    told = refused(*TRAIN, *on, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 17)
    assert "NUM_KEYPOINTS is 17 on the command line, but the data have 2 keypoints" in told


@pytest.fixture
def make_keypoints(work: Path) -> Callable[..., None]:
    """Gives the objects of a.json two keypoints each."""

    def make(**category: Any) -> None:
        file = work / "my data" / "a.json"
        content = json.loads(file.read_text())
        for annotation in content["annotations"]:
            x, y, size, _ = annotation["bbox"]
            annotation |= {"keypoints": [x, y, 2, x + size, y, 2], "num_keypoints": 2}
        for entry in content["categories"]:
            entry |= {"keypoints": ["left_ear", "right_ear"]} | category
        file.write_text(json.dumps(content))

    return make


def test_a_model_with_keypoints_trains_on_them(work: Path, make_keypoints: Callable[..., None]) -> None:
    make_keypoints(sigmas=[0.1, 0.2])
    on = ["MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "[8]", "MODEL.ROI_HEADS.NAME"]
    on += ["StandardROIHeads", "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", "1", "SOLVER.MAX_ITER", "2"]
    train_net.run(["--config-file", "row.yaml", *TRAIN, "--split", "0.5", *on, "OUTPUT_DIR", "mine"])
    line = json.loads((work / "mine" / "metrics.json").read_text().splitlines()[-1])
    assert "keypoints/AP" in line
