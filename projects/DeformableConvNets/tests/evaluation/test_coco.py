# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""faster-coco-eval gives the numbers of pycocotools."""

from __future__ import annotations

import builtins
import importlib.util
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from dcn_d2.evaluation.coco import FasterCOCOEvaluator, FileOrderCOCOEvaluator, build_coco_evaluator

from ..slim import slim_config

SIZE = 256
NAMES = ["many", "few", "crowds only", "never", "found nowhere"]
KEYPOINTS = 5
needs_faster = pytest.mark.skipif(
    importlib.util.find_spec("faster_coco_eval") is None, reason="the package faster-coco-eval is not installed"
)


@pytest.fixture
def name() -> Iterator[str]:
    yield "random_coco"
    DatasetCatalog.pop("random_coco", None)
    MetadataCatalog.pop("random_coco", None)


def random_truth(random: np.random.Generator, images: int) -> dict[str, Any]:
    """Objects of all sizes, crowds, categories without objects, and images without any."""
    annotations = []
    for image in range(1, images):  # the first one is empty
        for _ in range(random.integers(1, 12)):
            size = random.choice([10, 60, 150], size=2) + random.integers(0, 20, size=2)
            x, y = random.integers(0, SIZE - size)
            category = int(random.choice([1, 1, 1, 2, 3, 5]))
            crowd = category == 3 or random.random() < 0.15
            mask = np.zeros((SIZE, SIZE), np.uint8, order="F")
            mask[y : y + size[1], x : x + size[0]] = 1
            runs = pycocotools.mask.encode(mask)
            points = np.stack([random.integers(x, x + size[0], KEYPOINTS), random.integers(y, y + size[1], KEYPOINTS)])
            visible = random.integers(0, 3, KEYPOINTS) * (0 if random.random() < 0.1 else 1)
            corners = [x, y, x + size[0], y, x + size[0], y + size[1], x, y + size[1]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image + 1,
                    "category_id": category,
                    "iscrowd": int(crowd),
                    "bbox": [int(v) for v in (x, y, *size)],
                    "area": float(size[0] * size[1]),
                    "keypoints": np.vstack([points, visible]).T.ravel().tolist(),
                    "num_keypoints": int((visible > 0).sum()),
                    "segmentation": {"size": [SIZE, SIZE], "counts": runs["counts"].decode()}
                    if crowd
                    else [[int(v) for v in corners]],
                }
            )
    sizes = [{"id": i + 1, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in range(images)]
    categories = [{"id": i + 1, "name": text} for i, text in enumerate(NAMES)]
    return {"images": sizes, "annotations": annotations, "categories": categories}


def random_predictions(random: np.random.Generator, truth: dict[str, Any], wrong: int) -> list[Instances]:
    """Moved copies of the objects, some twice, and `wrong` others in each image but the second, where nothing is."""
    predictions = []
    for image in truth["images"]:
        there = [a for a in truth["annotations"] if a["image_id"] == image["id"] and a["category_id"] != 5]
        copies = [] if image["id"] == 2 else [there[i] for i in random.integers(0, len(there), len(there) * 2)]
        boxes = [np.array(a["bbox"], float) + random.normal(0, 0.06, 4) * max(a["bbox"]) for a in copies]
        classes = [a["category_id"] - 1 if random.random() < 0.9 else 1 for a in copies]
        points = [np.reshape(a["keypoints"], (-1, 3)) + random.normal(0, 4, (KEYPOINTS, 3)) for a in copies]
        for _ in range(0 if image["id"] == 2 else wrong):
            boxes.append(random.uniform(0, SIZE / 2, 4))
            classes.append(int(random.integers(0, 3)))
            points.append(random.uniform(0, SIZE, (KEYPOINTS, 3)))
        corners = np.array(boxes).reshape(-1, 4)
        corners[:, 2:] = np.maximum(corners[:, 2:], 2) + corners[:, :2]
        masks = np.zeros((len(corners), SIZE, SIZE), bool)
        for mask, (x0, y0, x1, y1) in zip(masks, corners.clip(0, SIZE).astype(int)):
            mask[y0:y1, x0:x1] = True
        scores = random.uniform(0.01, 1, len(corners)).round(1)  # many of them equal
        found = Instances((SIZE, SIZE))
        found.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float32))
        found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(classes, dtype=torch.int64)
        found.pred_masks = torch.from_numpy(masks)
        found.pred_keypoints = torch.tensor(np.array(points).reshape(-1, KEYPOINTS, 3), dtype=torch.float32)
        predictions.append(found)
    return predictions


def results_of(evaluator: COCOEvaluator, truth: dict[str, Any], predictions: list[Instances]) -> dict[str, Any]:
    evaluator.reset()
    for image, found in zip(truth["images"], predictions):
        copied = Instances(found.image_size, **{key: value.clone() for key, value in found.get_fields().items()})
        evaluator.process([{"image_id": image["id"]}], [{"instances": copied}])
    return evaluator.evaluate()


def both_results(name: str, folder: Path, truth: dict[str, Any], predictions: list[Instances], **more: Any) -> Any:
    (folder / "truth.json").write_text(json.dumps(truth))
    register_coco_instances(name, {}, str(folder / "truth.json"), str(folder))
    DatasetCatalog.get(name)
    arguments = {"tasks": ["bbox", "segm", "keypoints"], "kpt_oks_sigmas": [0.05] * KEYPOINTS, **more}
    slow = COCOEvaluator(name, distributed=False, use_fast_impl=False, **arguments)
    fast = FasterCOCOEvaluator(name, distributed=False, **arguments)
    return results_of(slow, truth, predictions), results_of(fast, truth, predictions)


@needs_faster
@pytest.mark.parametrize("wrong", [3, 120])  # more than 100 in an image are too many for COCO
def test_numbers_are_those_of_pycocotools(name: str, tmp_path: Path, seed: int, wrong: int) -> None:
    random = np.random.default_rng(seed)
    truth = random_truth(random, images=8)
    predictions = random_predictions(random, truth, wrong)
    slow, fast = both_results(name, tmp_path, truth, predictions)
    assert set(slow) == {"bbox", "segm", "keypoints"}
    for task in slow:
        assert set(slow[task]) == set(fast[task]) >= {"AP", "AP50", "AP-many", "AP-never"}
        assert (
            0 < slow[task]["AP"] < 100 and np.isnan(slow[task]["AP-never"]) and np.isnan(slow[task]["AP-crowds only"])
        )
        for metric, value in slow[task].items():
            assert fast[task][metric] == pytest.approx(value, abs=1e-9, nan_ok=True), (task, metric)


@needs_faster
def test_numbers_without_predictions_are_those_of_pycocotools(name: str, tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    truth = random_truth(random, images=3)
    nothing = [found[:0] for found in random_predictions(random, truth, 1)]
    slow, fast = both_results(name, tmp_path, truth, nothing)
    assert np.isnan(slow["bbox"]["AP"]) and np.isnan(fast["bbox"]["AP"])


def test_package_is_chosen_by_key_and_by_what_is_installed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "truth.json").write_text(json.dumps(random_truth(np.random.default_rng(0), images=2)))
    register_coco_instances(name, {}, str(tmp_path / "truth.json"), str(tmp_path))
    caplog.set_level(logging.INFO, "dcn_d2")
    cfg = slim_config()
    installed = importlib.util.find_spec

    def build(value: str, there: bool) -> tuple[type, str]:
        caplog.clear()
        cfg.TEST.COCO_EVAL = value
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda text: installed(text) if text != "faster_coco_eval" else there or None
        )
        kind = type(build_coco_evaluator(cfg, name, ["bbox"], str(tmp_path)))
        (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("dcn_d2")]
        return kind, line

    assert build("pycocotools", True)[0] is build("auto", False)[0] is FileOrderCOCOEvaluator
    assert "COCO's AP by pycocotools" in build("auto", False)[1]
    with pytest.raises(ValueError, match="TEST.COCO_EVAL is faster-coco-eval, .*: pip install faster-coco-eval"):
        build("faster-coco-eval", False)
    if installed("faster_coco_eval"):
        assert build("auto", True)[0] is build("faster-coco-eval", True)[0] is FasterCOCOEvaluator
        assert "COCO's AP by faster-coco-eval" in build("auto", True)[1]


@needs_faster
def test_the_table_of_pycocotools_is_still_printed(
    name: str, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(seed)
    truth = random_truth(random, images=3)
    both_results(name, tmp_path, truth, random_predictions(random, truth, 1), tasks=["bbox"])
    assert capsys.readouterr().out.count("Average Precision  (AP) @[ IoU=0.50:0.95") == 2 * 4
    assert builtins.print is print
