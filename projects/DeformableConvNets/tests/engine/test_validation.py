# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The validation loss: its value, and that computing it changes nothing else."""

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from dcn_d2.data.mapper import DCNDatasetMapper
from dcn_d2.engine import DCNTrainer
from dcn_d2.engine.validation import validation_loss

from .test_averaging import assert_equal
from .test_trainer import loggers_as_before  # noqa: F401  a fixture
from .tiny import tiny_config

PARTS = ["loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"]
TEST = ["DATASETS.TEST", ("nuclei_val",), "TEST.LOSS", True]


def warm(cfg: CfgNode) -> Any:
    """A model whose statistics of BatchNorm are not the initial ones, and whose weights are those of every call."""
    seed_all_rng(0)
    model = build_model(cfg)
    samples = [DCNDatasetMapper(cfg, is_train=True)(entry) for entry in entries()[:2]]
    with EventStorage():
        model.train()(samples)
    return model


def entries() -> list[dict[str, Any]]:
    from detectron2.data import DatasetCatalog

    return DatasetCatalog.get("nuclei_val")


def test_value_is_the_mean_over_the_images(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, *TEST, "INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TEST", 64)
    model = warm(cfg)
    found = validation_loss(cfg, model)
    assert set(found) == {"validation_loss", *(f"validation_loss/{name}" for name in PARTS)}
    # The same by hand: images one by one, running statistics, the documented seed.
    judged = copy.deepcopy(model).train()
    for module in judged.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    sums: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()  # what a loader draws when it starts
    with torch.no_grad(), EventStorage():
        for entry in entries():
            for name, loss in judged([DCNDatasetMapper(cfg, is_train=True)(entry)]).items():
                sums[name] += float(loss) / len(entries())
    for name, expected in sums.items():
        assert found[f"validation_loss/{name}"] == pytest.approx(expected, rel=1e-5), name
    assert found["validation_loss"] == pytest.approx(sum(sums.values()), rel=1e-5)
    assert validation_loss(cfg, model) == found, "each time the same"


def test_computing_it_changes_neither_the_model_nor_the_random_numbers(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, *TEST)
    model = warm(cfg)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    with EventStorage() as storage:
        validation_loss(cfg, model)
        assert not storage.latest(), "what the model notes in training is not of this training"
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[2]))
    assert_equal(dict(model.state_dict()), dict(before))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_model_that_changes_itself_in_training_is_left_alone(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, *TEST, "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 1)
    cfg.MODEL.BACKBONE.NAME = "build_dcn_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    model = warm(cfg)
    before = model.loss_normalizer
    assert validation_loss(cfg, model)["validation_loss"] > 0
    assert model.loss_normalizer == before


def test_model_that_predicts_infinite_boxes_has_no_loss_and_the_training_goes_on(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, *TEST)
    model = warm(cfg)
    model.proposal_generator.rpn_head.anchor_deltas.bias.data.fill_(float("inf"))
    assert math.isnan(validation_loss(cfg, model)["validation_loss"])


def run(folder: Path, *keys: Any) -> DCNTrainer:
    seed_all_rng(3)
    trainer = DCNTrainer(tiny_config(folder, "TEST.EVAL_PERIOD", 1, "SOLVER.BASE_LR", 0.02, *TEST[:2], *keys))
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


def test_training_is_the_same_with_and_without_it(tmp_path: Path) -> None:
    run(tmp_path / "with", "TEST.LOSS", True)
    run(tmp_path / "without")
    with_it, without = (torch.load(tmp_path / name / "model_final.pth") for name in ("with", "without"))
    assert_equal(with_it, without)
    line = json.loads((tmp_path / "with" / "metrics.json").read_text().splitlines()[-1])
    assert line["validation_loss"] == pytest.approx(sum(line[f"validation_loss/{name}"] for name in PARTS))
    assert "validation_loss" not in (tmp_path / "without" / "metrics.json").read_text()


def test_each_of_several_test_sets_has_its_own(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "DATASETS.TEST", ("nuclei_val", "nuclei_train"), "TEST.LOSS", True)
    found = validation_loss(cfg, warm(cfg))
    assert list(found) == ["nuclei_val", "nuclei_train"]
    assert found["nuclei_val"]["validation_loss"] != found["nuclei_train"]["validation_loss"]
    best = ["TEST.BEST_METRIC", "nuclei_train/validation_loss", "SOLVER.MAX_ITER", 2]
    run(tmp_path / "run", "DATASETS.TEST", ("nuclei_val", "nuclei_train"), "TEST.LOSS", True, *best)
    saved = torch.load(tmp_path / "run" / "model_best.pth")["best"]
    assert (saved["metric"], saved["mode"]) == ("nuclei_train/validation_loss", "min")
