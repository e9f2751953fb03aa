# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Trainings and evaluations on each kind of data set, on several of them, and with test-time augmentation."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from detectron2 import model_zoo
from detectron2.config import CfgNode

from dcn_d2.engine import DCNTrainer, load_config

from ..engine.tiny import tiny_config
from ..slim import slim_config
from .sets import Sets

PROJECT = Path(__file__).resolve().parents[2]


def train(cfg: CfgNode) -> tuple[DCNTrainer, Any]:
    trainer = DCNTrainer(cfg)
    trainer.resume_or_load(resume=False)
    return trainer, trainer.train()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


AUGMENTED = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 64), "TEST.AUG.MAX_SIZE", 96]


def test_augmentation_comes_once_after_training(tmp_path: Path, sets: Sets) -> None:
    name, out = sets.coco(), tmp_path / "out"
    keys = ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)]
    cfg = tiny_config(out, *keys, *AUGMENTED, "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1)
    trainer, results = train(cfg)
    assert list(results) == ["bbox", "bbox_TTA"] and trainer.cfg.TEST.AUG.ENABLED
    recorded = metrics(out)
    first = [key for line in recorded[:-1] for key in line]
    assert "bbox/AP" in first and "bbox_TTA/AP" not in first
    assert recorded[-1]["bbox_TTA/AP50"] == pytest.approx(results["bbox_TTA"]["AP50"], nan_ok=True)
    for folder in ("inference", "inference_TTA"):
        assert (out / folder / name / "coco_instances_results.json").exists()
    assert trainer.model.training, "as before"
    # The same again, by the method that scripts call, in the model's mode.
    model = trainer.checkpointer.model.eval()
    again = DCNTrainer.test(trainer.cfg, model)
    assert list(again) == ["bbox", "bbox_TTA"]
    assert again["bbox_TTA"]["AP"] == pytest.approx(results["bbox_TTA"]["AP"], nan_ok=True)
    assert not model.training
    given = DCNTrainer.test(trainer.cfg, model, [DCNTrainer.build_evaluator(trainer.cfg, name)])
    assert list(given) == ["bbox", "bbox_TTA"]


def copypaste(log: Path) -> list[str]:
    """The numbers of each evaluation in a log."""
    return re.findall(r"copypaste: ([\d.,nan]+)$", log.read_text(), re.MULTILINE)


@pytest.mark.slow
def test_evaluation_in_two_processes_gives_what_the_training_gave(tmp_path: Path) -> None:
    out = tmp_path / "trained"
    train(tiny_config(out, *AUGMENTED, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", ("nuclei_val",)))
    command = [sys.executable, PROJECT / "train_net.py", "--num-gpus", 2, "--eval-only"]
    command += ["--config-file", out / "config.yaml", "MODEL.WEIGHTS", out / "model_final.pth", "OUTPUT_DIR", "again"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([*map(str, command)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = copypaste(out / "log.txt")
    assert len(numbers) == 2, "without and with augmentation"
    assert copypaste(tmp_path / "again" / "log.txt") == numbers


def test_several_test_sets(tmp_path: Path, sets: Sets, caplog: pytest.LogCaptureFixture) -> None:
    one, two, out = sets.coco("one"), sets.coco("two"), tmp_path / "out"
    keys = ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "DATASETS.TRAIN", (one,), "DATASETS.TEST", (one, two)]
    expected = ["TEST.EXPECTED_RESULTS", [["two/bbox", "AP", 50, 50], ["one_TTA/bbox", "AP", 50, 50]]]
    cfg = tiny_config(out, *keys, *expected, *AUGMENTED, "SOLVER.MAX_ITER", 1)
    caplog.set_level(logging.INFO)
    _, results = train(cfg)
    assert list(results) == ["one", "two", "one_TTA", "two_TTA"] and list(results["two"]) == ["bbox"]
    assert {"one/bbox/AP", "two/bbox/AP", "two_TTA/bbox/AP"} <= set(metrics(out)[-1])
    assert "Results verification passed." in caplog.text
    for name in (one, two):
        assert (out / "inference" / name / "coco_instances_results.json").exists()
    assert results["two/bbox"] == results["two"]["bbox"]
    with pytest.raises(KeyError, match=r"no results for 'two/segm', only for one/bbox, two/bbox, one_TTA/bbox"):
        results["two/segm"]
    with pytest.raises(ValueError, match=r"has the task 'bbox', but DATASETS.TEST names 2 .* as in 'one/bbox'"):
        DCNTrainer.check(tiny_config(out, *keys, "TEST.EXPECTED_RESULTS", [["bbox", "AP", 50, 50]]))


def test_wrong_results_of_one_of_several_sets_end_in_failure(tmp_path: Path, sets: Sets) -> None:
    one, two = sets.coco("one"), sets.coco("two")
    keys = ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "DATASETS.TRAIN", (one,), "DATASETS.TEST", (one, two)]
    cfg = tiny_config(
        tmp_path / "out", *keys, "SOLVER.MAX_ITER", 1, "TEST.EXPECTED_RESULTS", [["two/bbox", "AP", 99, 1]]
    )
    with pytest.raises(SystemExit):
        train(cfg)


def panoptic_config(folder: Path, name: str, *keys: Any) -> CfgNode:
    """Detectron2's own panoptic row with deformable convolutions and a cascade, made narrow."""
    cfg = load_config(model_zoo.get_config_file("Misc/panoptic_fpn_R_101_dconv_cascade_gn_3x.yaml"))
    cfg = slim_config(cfg)
    cfg.merge_from_list(
        [
            *("MODEL.RESNETS.WIDTH_PER_GROUP", 32, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32),  # GN has 32 groups
            *("MODEL.ROI_BOX_HEAD.CONV_DIM", 32, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.BACKBONE.FREEZE_AT", 0),
            *("MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20),
            *("DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "DATALOADER.NUM_WORKERS", 0),
            *("INPUT.MIN_SIZE_TRAIN", (64,), "SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ()),
            *("SEED", 1, "OUTPUT_DIR", str(folder), *keys),
        ]
    )
    return cfg


@pytest.mark.usefixtures("panopticapi")
def test_panoptic_row_of_detectron2_trains_and_gets_its_pq(tmp_path: Path, sets: Sets) -> None:
    cfg = panoptic_config(tmp_path / "out", sets.panoptic())
    trainer, results = train(cfg)
    assert set(results) == {"sem_seg", "bbox", "segm", "panoptic_seg"}
    assert 0 <= results["panoptic_seg"]["PQ"] <= 100 and 0 <= results["sem_seg"]["mIoU"] <= 100
    assert type(trainer.checkpointer.model).__name__ == "PanopticFPN"
    assert any("DeformConv" in type(layer).__name__ for layer in trainer.checkpointer.model.modules())
    DCNTrainer.check_data(cfg)
    with pytest.raises(ValueError, match="TEST.AUG.ENABLED is True, but MODEL.META_ARCHITECTURE is PanopticFPN"):
        DCNTrainer.check(panoptic_config(tmp_path / "out", cfg.DATASETS.TEST[0], "TEST.AUG.ENABLED", True))


def test_pascal_voc_trains(tmp_path: Path, sets: Sets) -> None:
    name = sets.voc()
    keys = ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)]
    _, results = train(tiny_config(tmp_path / "out", *keys, "SOLVER.MAX_ITER", 2))
    assert set(results["bbox"]) == {"AP", "AP50", "AP75"}


def test_lvis_trains(tmp_path: Path, sets: Sets) -> None:
    pytest.importorskip("lvis", reason="the package lvis is not installed")
    name = sets.lvis()
    keys = ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)]
    keys += ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.001]
    _, results = train(tiny_config(tmp_path / "out", *keys, "MODEL.MASK_ON", True, "SOLVER.MAX_ITER", 2))
    assert {"AP", "APr", "APc", "APf"} <= set(results["bbox"]) and set(results) == {"bbox", "segm"}


def test_semantic_segmentation_trains(tmp_path: Path, sets: Sets) -> None:
    name = sets.semantic()
    keys = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3]
    keys += ["MODEL.SEM_SEG_HEAD.CONVS_DIM", 8, "MODEL.SEM_SEG_HEAD.NORM", "", "DATASETS.TRAIN", (name,)]
    _, results = train(tiny_config(tmp_path / "out", *keys, "DATASETS.TEST", (name,), "SOLVER.MAX_ITER", 2))
    assert 0 <= results["sem_seg"]["mIoU"] <= 100 and "IoU-person" in results["sem_seg"]
