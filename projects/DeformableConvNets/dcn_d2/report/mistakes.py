# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The images in which a model is most often wrong, and the classes that it takes for others."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.cocoeval import COCOeval

from .evaluation import images_of

IOU = 0.5


@dataclass
class ImageMistakes:
    """What is right and wrong in one image at a threshold of the score; ids are those of pycocotools."""

    image: int
    found: list[int] = field(default_factory=list)  # annotations
    missed: list[int] = field(default_factory=list)  # annotations
    right: list[int] = field(default_factory=list)  # detections
    wrong: list[int] = field(default_factory=list)  # detections

    @property
    def count(self) -> int:
        """How many mistakes there are."""
        return len(self.missed) + len(self.wrong)


def find_mistakes(done: COCOeval, threshold: float) -> list[ImageMistakes]:
    """Gives the images with mistakes, the worst one first.

    pycocotools matches detections in the order of their scores. So what it has matched with a score above the
    threshold is what it would match without the rest.

    Args:
        done: an evaluation that has run.
        threshold: the lowest score of a detection that counts.
    """
    images: dict[int, ImageMistakes] = {}
    for number in range(len(done.params.catIds)):
        for entry in images_of(done, number):
            image = images.setdefault(entry["image_id"], ImageMistakes(entry["image_id"]))
            scores = dict(zip(entry["dtIds"], entry["dtScores"]))
            for annotation, match, ignored in zip(entry["gtIds"], entry["gtMatches"][0], entry["gtIgnore"]):
                if not ignored:
                    hit = match > 0 and scores[int(match)] >= threshold
                    (image.found if hit else image.missed).append(int(annotation))
            for detection, match, ignored in zip(entry["dtIds"], entry["dtMatches"][0], entry["dtIgnore"][0]):
                if scores[detection] >= threshold and not ignored:
                    (image.right if match else image.wrong).append(int(detection))
    wrong = [image for image in images.values() if image.count]
    return sorted(wrong, key=lambda image: (-image.count, -len(image.missed), image.image))


def confusion(done: COCOeval, threshold: float) -> np.ndarray:
    """Counts which class is found where an object of another one is, by boxes alone.

    In each image, detections take the object of the highest IoU of at least 0.5 that is still free, whatever its class,
    in the order of their scores.

    Args:
        done: an evaluation of boxes that has run.
        threshold: the lowest score of a detection that counts.

    Returns:
        (classes + 1, classes + 1): rows are true classes and, last, no object; columns are found classes and, last,
        nothing.
    """
    index = {category: number for number, category in enumerate(done.params.catIds)}
    nothing = len(index)
    table = np.zeros((nothing + 1, nothing + 1), dtype=int)
    detections: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for detection in done.cocoDt.anns.values():
        if detection["score"] >= threshold:
            detections[detection["image_id"]].append(detection)
    for image in done.params.imgIds:
        truth = [one for one in done.cocoGt.imgToAnns.get(image, []) if one["category_id"] in index]
        objects = [one for one in truth if not one.get("iscrowd", 0)]
        crowds = [one for one in truth if one.get("iscrowd", 0)]
        found = sorted(detections.get(image, []), key=lambda one: -one["score"])[: done.params.maxDets[-1]]
        overlaps, in_crowd = _overlaps(found, objects, 0), _overlaps(found, crowds, 1)
        free = np.ones(len(objects), dtype=bool)
        for number, detection in enumerate(found):
            row = np.where(free, overlaps[number], -1) if len(objects) else np.zeros(0)
            best = int(row.argmax()) if len(row) else -1
            if best >= 0 and row[best] >= IOU:
                free[best] = False
                table[index[objects[best]["category_id"]], index[detection["category_id"]]] += 1
            elif not (len(crowds) and (in_crowd[number] >= IOU).any()):
                table[nothing, index[detection["category_id"]]] += 1
        for missed in np.flatnonzero(free):
            table[index[objects[missed]["category_id"]], nothing] += 1
    return table


def _overlaps(found: list[dict[str, Any]], objects: list[dict[str, Any]], crowd: int) -> np.ndarray:
    if not found or not objects:
        return np.zeros((len(found), len(objects)))
    boxes = [[one["bbox"] for one in ones] for ones in (found, objects)]
    return np.asarray(mask_utils.iou(*boxes, [crowd] * len(objects)))
