# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""AP by class and by size, precision/recall curves and score thresholds of one test set.

The evaluation that has written the results runs once more, by the same function of Detectron2 on pycocotools, because
its arrays are not kept on disk. So the numbers here are those of the training's log.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
# In the order of COCOeval's `stats`.
MEASURES = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
}
SIZES = {"small": "APs", "medium": "APm", "large": "APl"}
NAN = float("nan")


@dataclass
class Threshold:
    """The lowest score at which F1 is best, for IoU 0.5 (keypoints: OKS 0.5), and what it gives."""

    score: float = NAN
    f1: float = NAN
    precision: float = NAN
    recall: float = NAN


@dataclass
class ClassResult:
    """One class: how many objects the test set has, AP in percent, and the curve of precision at IoU 0.5 and 0.75."""

    name: str
    objects: int
    ap: dict[str, float]
    curves: np.ndarray  # (2, 101)
    best: Threshold


@dataclass
class TaskResult:
    """Boxes, masks or keypoints of one test set.

    ``curves`` is (2, 101): precision at IoU 0.5 and 0.75, averaged over classes, for the recalls in ``recalls``.
    """

    task: str
    ap: dict[str, float]
    recalls: np.ndarray
    curves: np.ndarray
    best: Threshold
    classes: list[ClassResult] = field(default_factory=list)


def tasks_of(results: Sequence[dict[str, Any]]) -> list[str]:
    """Gives the tasks for which results in COCO's format have predictions."""
    return [task for task, key in FIELDS.items() if results and key in results[0]]


def run_evaluation(truth: COCO, results: list[dict[str, Any]], task: str, sigmas: Sequence[float] = ()) -> COCOeval:
    """Evaluates as the training did.

    Args:
        truth: the annotations.
        results: predictions in COCO's format; not empty.
        task: "bbox", "segm" or "keypoints".
        sigmas: TEST.KEYPOINT_OKS_SIGMAS.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        return _evaluate_predictions_on_coco(truth, results, task, sigmas, cocoeval_fn=COCOeval)


def summarize(done: COCOeval, task: str) -> TaskResult:
    """Gives the numbers of an evaluation that has run."""
    params, precision = done.params, done.eval["precision"]  # (IoU, recall, class, area, limit on detections)
    at = [int(np.argmin(np.abs(params.iouThrs - iou))) for iou in (0.5, 0.75)]
    objects = _count_objects(done)
    matched = [_matched_scores(done, number) for number in range(len(params.catIds))]
    classes = []
    for number, category in enumerate(params.catIds):
        own = precision[:, :, number, :, -1]
        ap = {"AP": _mean(own[:, :, 0]), "AP50": _mean(own[at[0], :, 0]), "AP75": _mean(own[at[1], :, 0])}
        for index, label in enumerate(params.areaRngLbl):
            if label in SIZES:
                ap[SIZES[label]] = _mean(own[:, :, index])
        curves = np.where(own[at, :, 0] > -1, own[at, :, 0], np.nan)
        best = best_threshold(*matched[number], objects[number])
        name = str(done.cocoGt.cats[category].get("name", category))
        classes.append(ClassResult(name, objects[number], ap, curves, best))
    scores, right = (
        (np.concatenate(parts) if parts else np.zeros(0) for parts in zip(*matched))
        if matched
        else (
            np.zeros(0),
            np.zeros(0, bool),
        )
    )
    measured = [one.curves for one in classes if np.isfinite(one.curves).any()]
    return TaskResult(
        task=task,
        ap={name: value * 100 if value >= 0 else NAN for name, value in zip(MEASURES[task], done.stats)},
        recalls=params.recThrs,
        curves=np.mean(measured, axis=0) if measured else np.full((2, len(params.recThrs)), np.nan),
        best=best_threshold(scores, right.astype(bool), sum(objects)),
        classes=classes,
    )


def _mean(precision: np.ndarray) -> float:
    """AP in percent; -1 stands for a class without objects."""
    valid = precision[precision > -1]
    return float(valid.mean() * 100) if valid.size else NAN


def images_of(done: COCOeval, number: int) -> list[dict[str, Any]]:
    """Gives what pycocotools has matched in each image for the class of this number, for objects of all sizes."""
    images = len(done.params.imgIds)
    start = number * len(done.params.areaRng) * images
    return [entry for entry in done.evalImgs[start : start + images] if entry is not None]


def _count_objects(done: COCOeval) -> list[int]:
    """How many objects each class has that count: not crowds, and for keypoints those with visible ones."""
    numbers = range(len(done.params.catIds))
    return [sum(int((~entry["gtIgnore"].astype(bool)).sum()) for entry in images_of(done, n)) for n in numbers]


def _matched_scores(done: COCOeval, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Gives scores of one class's detections that count at IoU 0.5, and whether each is right."""
    scores, right = [np.zeros(0)], [np.zeros(0, bool)]
    for entry in images_of(done, number):
        counts = ~entry["dtIgnore"][0].astype(bool)
        scores.append(np.asarray(entry["dtScores"], dtype=float)[counts])
        right.append(entry["dtMatches"][0][counts] != 0)
    return np.concatenate(scores), np.concatenate(right)


def best_threshold(scores: np.ndarray, right: np.ndarray, objects: int) -> Threshold:
    """Finds the lowest score that a detection must have for the best F1.

    Args:
        scores: of all detections.
        right: whether each is right.
        objects: how many there are to find.
    """
    if not objects or not right.any():
        return Threshold()
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(right[order])
    last = np.append(scores[1:] != scores[:-1], True)  # detections of equal scores come together
    precision, recall = found[last] / (np.flatnonzero(last) + 1), found[last] / objects
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    index = int(f1.argmax())
    return Threshold(*(float(values[index]) for values in (scores[last], f1, precision, recall)))
