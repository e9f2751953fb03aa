# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Each kind of data set gets its measure: predictions without a mistake give 100, a known mistake a known number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from dcn_d2.data import check_data
from dcn_d2.engine import DCNTrainer

from ..slim import slim_config
from .sets import CLASSES, IMAGES, Sets, perfect_instances, scores_of, segments_of


def config(name: str, *keys: Any, folder: Path | str = "unused") -> CfgNode:
    cfg = slim_config()
    sets = ["DATASETS.TEST", (name,), "DATASETS.TRAIN", (), "MODEL.ROI_HEADS.NUM_CLASSES", 2]
    cfg.merge_from_list([*sets, "OUTPUT_DIR", str(folder), *keys])
    return cfg


def measure(evaluator: DatasetEvaluator, name: str, outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of outputs for the images of a data set, which are in the order of their file names."""
    records = sorted(DatasetCatalog.get(name), key=lambda record: record["file_name"])
    assert len(records) == len(outputs)
    evaluator.reset()
    for record, output in zip(records, outputs):
        evaluator.process([record], [output])
    return evaluator.evaluate()


MASKS = ("MODEL.MASK_ON", True)
SEMANTIC = ("MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3)
PANOPTIC = ("MODEL.META_ARCHITECTURE", "PanopticFPN", *MASKS, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2)
PANOPTIC += ("MODEL.PANOPTIC_FPN.COMBINE.ENABLED", True)


@pytest.mark.parametrize("typed", [True, False])
def test_coco(sets: Sets, tmp_path: Path, typed: bool) -> None:
    from detectron2.data import MetadataCatalog

    name = sets.coco()
    if not typed:
        del MetadataCatalog.get(name).evaluator_type
    cfg = config(name, *MASKS, folder=tmp_path)
    check_data(cfg, train=False)
    evaluator = DCNTrainer.build_evaluator(cfg, name)
    assert isinstance(evaluator, COCOEvaluator)
    results = measure(evaluator, name, [{"instances": perfect_instances(things)} for things in IMAGES])
    for task in ("bbox", "segm"):
        assert results[task]["AP"] == pytest.approx(100) and results[task]["AP-person"] == pytest.approx(100)
    assert (tmp_path / "inference" / name / "coco_instances_results.json").exists()


def test_lvis_with_any_numpy(sets: Sets, tmp_path: Path) -> None:
    pytest.importorskip("lvis", reason="the package lvis is not installed")
    name = sets.lvis()
    cfg = config(name, *MASKS, folder=tmp_path)
    check_data(cfg, train=False)
    DCNTrainer.check(cfg, train=False)
    evaluator = DCNTrainer.build_evaluator(cfg, name)
    assert isinstance(evaluator, LVISEvaluator)
    results = measure(evaluator, name, [{"instances": perfect_instances(things)} for things in IMAGES])
    for task in ("bbox", "segm"):
        assert [results[task][key] for key in ("AP", "APr", "APf")] == pytest.approx([100] * 3)
    # Nothing is found of the rare category, the person.
    cars = [[thing for thing in things if thing.category == 0] for things in IMAGES]
    results = measure(evaluator, name, [{"instances": perfect_instances(things)} for things in cars])
    assert results["bbox"]["APr"] == 0 and results["bbox"]["AP"] == pytest.approx(50)
    assert not hasattr(np, "float"), "NumPy stays as it is"


@pytest.mark.parametrize("year", [2007, 2012])
def test_pascal_voc(sets: Sets, tmp_path: Path, year: int) -> None:
    name = sets.voc(year=year)
    cfg = config(name, folder=tmp_path)
    check_data(cfg, train=False)
    evaluator = DCNTrainer.build_evaluator(cfg, name)
    assert isinstance(evaluator, PascalVOCDetectionEvaluator)
    results = measure(evaluator, name, [{"instances": perfect_instances(things)} for things in IMAGES])
    assert results["bbox"] == {key: pytest.approx(100) for key in ("AP", "AP50", "AP75")}
    cars = [[thing for thing in things if thing.category == 0] for things in IMAGES]
    results = measure(evaluator, name, [{"instances": perfect_instances(things)} for things in cars])
    assert results["bbox"]["AP50"] == pytest.approx(50), "of two categories, one is found"


def semantic_labels() -> list[np.ndarray]:
    labels = []
    for things in IMAGES:
        image = np.zeros(things[0].mask.shape, np.int64)
        for thing in things:
            image[thing.mask] = 1 + thing.category
        labels.append(image)
    return labels


def test_semantic_segmentation(sets: Sets, tmp_path: Path) -> None:
    name = sets.semantic()
    cfg = config(name, *SEMANTIC, folder=tmp_path)
    check_data(cfg, train=False)
    evaluator = DCNTrainer.build_evaluator(cfg, name)
    assert isinstance(evaluator, SemSegEvaluator)
    labels = semantic_labels()
    results = measure(evaluator, name, [{"sem_seg": scores_of(image, 3)} for image in labels])["sem_seg"]
    assert [results[key] for key in ("mIoU", "fwIoU", "mACC", "pACC")] == pytest.approx([100] * 4)
    # Persons are taken for cars: the cars' IoU is their part of both, and that of persons is 0.
    wrong = [np.minimum(image, 1) for image in labels]
    results = measure(evaluator, name, [{"sem_seg": scores_of(image, 3)} for image in wrong])["sem_seg"]
    seen = np.concatenate([image[2:].ravel() for image in labels])  # the first two rows are ignored
    assert results["IoU-sky"] == pytest.approx(100) and results["IoU-person"] == 0
    assert results["IoU-car"] == pytest.approx(100 * (seen == 1).sum() / (seen > 0).sum())


def panoptic_output(things: Any, found: int) -> dict[str, Any]:
    """What PanopticFPN gives if it finds the first `found` things and takes the others for sky."""
    ids = segments_of(things[:found]).astype(np.int32)
    segments = [{"id": 100, "isthing": False, "category_id": 1, "area": int((ids == 100).sum())}]
    for number, thing in enumerate(things[:found]):
        segments.append({"id": number + 1, "isthing": True, "category_id": thing.category, "score": 0.9})
    return {
        "instances": perfect_instances(things[:found]),
        "sem_seg": scores_of(ids == 100, 2),
        "panoptic_seg": (torch.from_numpy(ids), segments),
    }


@pytest.mark.usefixtures("panopticapi")
def test_panoptic_segmentation(sets: Sets, tmp_path: Path) -> None:
    name = sets.panoptic()
    cfg = config(name, *PANOPTIC, folder=tmp_path)
    check_data(cfg, train=False)
    evaluator = DCNTrainer.build_evaluator(cfg, name)
    assert isinstance(evaluator, DatasetEvaluators)
    results = measure(evaluator, name, [panoptic_output(things, len(things)) for things in IMAGES])
    assert set(results) == {"sem_seg", "bbox", "segm", "panoptic_seg"}
    assert results["sem_seg"]["mIoU"] == results["bbox"]["AP"] == results["segm"]["AP"] == pytest.approx(100)
    assert [results["panoptic_seg"][key] for key in ("PQ", "PQ_th", "PQ_st", "SQ", "RQ")] == pytest.approx([100] * 5)
    # Of the two persons the one in image 0 is missed, and of the three cars the second one in image 2.
    results = measure(evaluator, name, [panoptic_output(things, 1) for things in IMAGES])
    assert results["panoptic_seg"]["PQ_th"] == pytest.approx(100 * (2 * 2 / 5 + 2 * 1 / 3) / 2)
    assert results["panoptic_seg"]["SQ_th"] == pytest.approx(100)


def test_panoptic_data_without_panoptic_quality(sets: Sets, tmp_path: Path) -> None:
    name = sets.panoptic()
    cfg = config(name, *PANOPTIC, "TEST.PANOPTIC_QUALITY", False, folder=tmp_path)
    evaluator = DCNTrainer.build_evaluator(cfg, name)
    results = measure(evaluator, name, [panoptic_output(things, len(things)) for things in IMAGES])
    assert set(results) == {"sem_seg", "bbox", "segm"}


def test_cityscapes_instances(sets: Sets, tmp_path: Path) -> None:
    pytest.importorskip("cityscapesscripts", reason="the package cityscapesscripts is not installed")
    name = sets.cityscapes("instance_seg")
    cfg = config(name, *MASKS, "MODEL.ROI_HEADS.NUM_CLASSES", 8, folder=tmp_path)
    check_data(cfg, train=False)
    evaluator = DCNTrainer.build_evaluator(cfg, name)
    assert isinstance(evaluator, CityscapesInstanceEvaluator)
    number = {text: evaluator._metadata.thing_classes.index(text) for text in CLASSES}
    outputs = [perfect_instances(things) for things in IMAGES]
    for found in outputs:
        found.pred_classes = torch.tensor([number[CLASSES[i]] for i in found.pred_classes])
    results = measure(evaluator, name, [{"instances": found} for found in outputs])
    assert results["segm"] == {"AP": pytest.approx(100), "AP50": pytest.approx(100)}
    cars = [found[found.pred_classes == number["car"]] for found in outputs]
    assert measure(evaluator, name, [{"instances": found} for found in cars])["segm"]["AP"] == pytest.approx(50)


def test_cityscapes_semantic_segmentation(sets: Sets, tmp_path: Path) -> None:
    pytest.importorskip("cityscapesscripts", reason="the package cityscapesscripts is not installed")
    from cityscapesscripts.helpers.labels import name2label

    name = sets.cityscapes("sem_seg")
    cfg = config(name, *SEMANTIC[:2], "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 19, folder=tmp_path)
    check_data(cfg, train=False)
    evaluator = DCNTrainer.build_evaluator(cfg, name)
    assert isinstance(evaluator, CityscapesSemSegEvaluator)
    train_ids = np.array([name2label[text].trainId for text in ("sky", "car", "person")])
    labels = [train_ids[image] for image in semantic_labels()]
    results = measure(evaluator, name, [{"sem_seg": scores_of(image, 19)} for image in labels])
    assert results["sem_seg"]["IoU"] == results["sem_seg"]["IoU_sup"] == pytest.approx(100)
