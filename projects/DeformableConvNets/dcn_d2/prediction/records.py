# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What is written about an image: COCO's results, with the categories of the data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances, RotatedBoxes

from ..data.needs import read_needs
from ..engine.class_names import find_data_set

_WITHOUT_INSTANCES = ("SemanticSegmentor", "ProposalNetwork")


class Categories(NamedTuple):
    """The classes of a model, in its order: the ids that are written, and names."""

    ids: list[int]
    names: list[str]


def number_of_classes(cfg: CfgNode) -> int:
    """Gives the number of classes that a model tells apart."""
    things = read_needs(cfg, train=False).things
    return things[1] if things else cfg.MODEL.ROI_HEADS.NUM_CLASSES


def class_names(cfg: CfgNode, dataset: str | None = None) -> list[str]:
    """Gives the names of the model's classes, numbers where neither the config nor a data set tells them.

    Args:
        cfg: of the model.
        dataset: a data set that is asked before those of the config.
    """
    number = number_of_classes(cfg)
    if len(names := cfg.DATASETS.get("CLASS_NAMES", ())) == number:
        return list(names)
    name = _data_set_of(cfg, dataset)
    return list(MetadataCatalog.get(name).thing_classes) if name else [f"class {i}" for i in range(number)]


def _data_set_of(cfg: CfgNode, dataset: str | None = None) -> str:
    """Gives the first data set of the config that has the model's number of classes; "" if none has."""
    names = (*([dataset] if dataset else []), *cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
    return find_data_set(names, number_of_classes(cfg))


def find_categories(cfg: CfgNode, coco: list[dict[str, Any]], names: Sequence[str] = ()) -> Categories:
    """Gives the ids and names that are written for the model's classes.

    With a COCO file, these are its categories: the ones of the same names if the names of the model's classes are
    known, else those in the order of their ids, which is the order in which Detectron2 numbers them. Without one, they
    are the categories of the config's data set, or else the numbers of the classes, from 0.

    Args:
        cfg: of the model.
        coco: the categories of a COCO file; [] if there is none.
        names: of the classes, if the weights say them.

    Raises:
        ValueError: The categories are not those of the model.
    """
    known = bool(names or cfg.DATASETS.get("CLASS_NAMES", ()) or _data_set_of(cfg))
    names = list(names) or class_names(cfg)
    if not coco:
        return Categories(_ids_of(cfg, names), names)
    coco = sorted(coco, key=lambda category: category["id"])
    by_name = {category["name"]: category["id"] for category in coco}
    if known and len(by_name) == len(coco) and set(by_name) == set(names):
        return Categories([by_name[name] for name in names], names)
    if len(coco) != len(names) or known:
        theirs = ", ".join(str(category["name"]) for category in coco)
        raise ValueError(
            f"the model has {len(names)} classes ({', '.join(names)[:200]}), and the COCO file {len(coco)} categories "
            f"({theirs[:200]}): they must be the same. To predict its images without its categories, list their paths "
            "in a text file"
        )
    return Categories([category["id"] for category in coco], [str(category["name"]) for category in coco])


def _ids_of(cfg: CfgNode, names: list[str]) -> list[int]:
    """Gives the ids that the config's data set has for the model's classes, or else their numbers."""
    number, name = len(names), _data_set_of(cfg)
    if name and list(MetadataCatalog.get(name).thing_classes) == names:
        metadata = MetadataCatalog.get(name)
        ids = {index: key for key, index in metadata.get("thing_dataset_id_to_contiguous_id", {}).items()}
        if set(ids) == set(range(number)):
            return [ids[index] for index in range(number)]
    return list(range(number))


def check_gives_instances(cfg: CfgNode) -> None:
    """Refuses models that detect no objects."""
    if cfg.MODEL.META_ARCHITECTURE in _WITHOUT_INSTANCES:
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, which detects no objects: predict.py writes "
            "detections, use a detector such as GeneralizedRCNN"
        )


def detections_of(found: Instances, image_id: int | str, categories: Categories) -> list[dict[str, Any]]:
    """Gives the detections of an image as COCO's results: boxes, masks as run lengths, keypoints.

    Args:
        found: what the model gave, on the CPU; it is not changed.
        image_id: of the image.
        categories: of the model's classes.
    """
    if isinstance(found.pred_boxes, RotatedBoxes):
        raise ValueError("the model gives RotatedBoxes, but COCO's results hold upright boxes only")
    if found.has("pred_keypoints"):
        found = Instances(found.image_size, **found.get_fields())
        found.pred_keypoints = found.pred_keypoints.clone()  # Detectron2 shifts them in place
    results = instances_to_coco_json(found, image_id)
    for result in results:
        result["category_id"] = categories.ids[result["category_id"]]
    return results


def instances_of(record: dict[str, Any], categories: Categories) -> Instances:
    """Does the reverse of `detections_of`, for drawing: boxes, scores, classes and masks."""
    index = {key: number for number, key in enumerate(categories.ids)}
    found = Instances((record["height"], record["width"]))
    detections = record["detections"]
    boxes = torch.tensor([detection["bbox"] for detection in detections]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    found.pred_boxes = Boxes(boxes)
    found.scores = torch.tensor([detection["score"] for detection in detections])
    found.pred_classes = torch.tensor([index[d["category_id"]] for d in detections], dtype=torch.long)
    if detections and "segmentation" in detections[0]:
        masks = [pycocotools.mask.decode(detection["segmentation"]) for detection in detections]
        found.pred_masks = torch.from_numpy(np.stack(masks)).bool()
    return found
