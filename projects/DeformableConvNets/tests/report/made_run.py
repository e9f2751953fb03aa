# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A run that looks like one of Detectron2, made in a second: its evaluation is Detectron2's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, Instances
from PIL import Image

from dcn_d2 import add_dcn_config
from dcn_d2.report import runs

CLASSES = ("cat", '<b>&"dog"</b>', "$x$ y")
SIZE = 128


def write_data_set(folder: Path, images: int = 6, seed: int = 0) -> Path:
    """Writes noise images and an annotation file in COCO's format, whose categories are 2, 5 and 9."""
    random = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    annotations: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        noise = random.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"a<{image}>.png")
        for _ in range(5):
            x, y, side = *random.uniform(0, 80, 2), random.uniform(8, 45)
            entry = {"id": len(annotations) + 1, "image_id": image, "category_id": int(random.choice([2, 5, 9]))}
            box = [float(x), float(y), float(side), float(side)]
            annotations.append(entry | {"bbox": box, "area": float(side**2), "iscrowd": 0})
    data = {
        "images": [{"id": i, "file_name": f"a<{i}>.png", "width": SIZE, "height": SIZE} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in zip((2, 5, 9), CLASSES)],
    }
    (folder / "truth.json").write_text(json.dumps(data))
    return folder / "truth.json"


def detect(sample: dict[str, Any], random: np.random.Generator) -> Instances:
    """Finds most objects, about where they are, some of another class, and some where there are none."""
    boxes, classes, scores = [], [], []
    for annotation in sample["annotations"]:
        if random.random() < 0.8:
            box = np.array(annotation["bbox"]) + random.normal(0, 1.5, 4)
            boxes.append([box[0], box[1], box[0] + max(box[2], 1), box[1] + max(box[3], 1)])
            wrong = random.random() < 0.2
            classes.append((annotation["category_id"] + wrong) % 3)
            scores.append(random.uniform(0.4, 1))
    for _ in range(2):
        x, y = random.uniform(0, 90, 2)
        boxes.append([x, y, x + 20, y + 20])
        classes.append(random.integers(3))
        scores.append(random.uniform(0, 0.7))
    found = Instances((SIZE, SIZE))
    found.pred_boxes = Boxes(torch.tensor(np.array(boxes), dtype=torch.float32))
    found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(classes)
    return found


def make_run(folder: Path, name: str) -> dict[str, Any]:
    """Writes what a training in `folder` leaves; gives the results of its evaluation, {"bbox": {"AP": …}}."""
    truth = write_data_set(folder / "data")
    register_coco_instances(name, {}, str(truth), str(folder / "data" / "images"))
    random = np.random.default_rng(1)
    evaluator = COCOEvaluator(name, tasks=["bbox"], output_dir=str(folder / "inference" / name), distributed=False)
    evaluator.reset()
    for sample in DatasetCatalog.get(name):
        evaluator.process([sample], [{"instances": detect(sample, random)}])
    results = evaluator.evaluate()
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.OUTPUT_DIR, cfg.MODEL.DEVICE, cfg.SOLVER.MAX_ITER = str(folder), "cpu", 400
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), (name,)
    (folder / "config.yaml").write_text(cfg.dump())
    final = flatten_results_dict(results)
    lines = []
    for iteration in range(19, 400, 20):
        loss = 2 / (1 + iteration / 100)
        line = {"iteration": iteration, "total_loss": loss, "loss_cls": loss / 2, "lr": 0.01, "time": 0.25}
        if iteration == 199:
            line["bbox/AP"] = 1.5
        lines.append(line)
    lines.append({"iteration": 400, **final})
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs.begin_run(cfg, 0)
    runs.end_run(cfg, 200, "stopped")
    runs.begin_run(cfg, 200)
    runs.end_run(cfg, 400, "finished")
    return results


def forget(name: str) -> None:
    """Makes this process know as little about a data set as the next one will."""
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
