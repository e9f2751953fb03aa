# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Faults of data sets are told before anything runs: once, with file, image and field, and the way out."""

from __future__ import annotations

import copy
import gzip
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.coco
import pycocotools.mask
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import BoxMode
from detectron2.utils import comm
from PIL import Image

from dcn_d2.config import load_config
from dcn_d2.data import check_data, checks, image_files

NAMES = ["ant", "bee", "cat", "dog"]
NAN = float("nan")


class Data:
    """Data sets of 80 x 60 images in a folder, registered for the time of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        for number in (1, 2, 3):
            Image.new("RGB", (80, 60)).save(folder / f"{number}.png")

    def coco(self) -> dict[str, Any]:
        """A file in COCO's format without faults: an object of another category in each image."""
        box, polygon = [10, 10, 20, 30], [[10, 10, 30, 10, 30, 40, 10, 40]]
        fact = {"bbox": box, "area": 600, "iscrowd": 0, "segmentation": polygon}
        return {
            "images": [{"id": n, "file_name": f"{n}.png", "width": 80, "height": 60} for n in (1, 2, 3)],
            "annotations": [fact | {"id": n + 10, "image_id": n, "category_id": n} for n in (1, 2, 3)],
            "categories": [{"id": number + 1, "name": name} for number, name in enumerate(NAMES)],
        }

    def records(self) -> list[dict[str, Any]]:
        """The same in Detectron2's format."""
        fact = {"bbox": [10, 10, 20, 30], "bbox_mode": BoxMode.XYWH_ABS}
        return [
            {"file_name": str(self.folder / f"{n}.png"), "image_id": n, "width": 80, "height": 60}
            | {"annotations": [fact | {"category_id": n, "segmentation": [[10, 10, 30, 10, 30, 40]]}]}
            for n in (1, 2, 3)
        ]

    def register_file(self, name: str, content: Any, image_root: str | None = None) -> str:
        path = self.folder / f"{name}.json"
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        path.write_bytes(content)
        register_coco_instances(name, {}, str(path), str(self.folder) if image_root is None else image_root)
        self.names.append(name)
        return name

    def register(self, name: str, records: Any, **metadata: Any) -> str:
        DatasetCatalog.register(name, lambda: copy.deepcopy(records))
        MetadataCatalog.get(name).set(**({"thing_classes": NAMES} | metadata))
        self.names.append(name)
        return name


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Data]:
    data = Data(tmp_path)
    yield data
    for name in data.names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
    checks._checked.clear()


def config(train: str = "", test: str = "", *opts: Any) -> CfgNode:
    sets = ["DATASETS.TRAIN", (train,) if train else (), "DATASETS.TEST", (test,) if test else ()]
    cfg = load_config("")
    cfg.merge_from_list([*sets, "MODEL.ROI_HEADS.NUM_CLASSES", len(NAMES), *opts])  # not all that it takes to build one
    return cfg


def error_of(cfg: CfgNode, train: bool = True) -> str:
    with pytest.raises(ValueError) as error:
        check_data(cfg, train)
    return str(error.value)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, "dcn_d2")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("dcn_d2")]


MASKS = ("MODEL.MASK_ON", True)
P7 = ("MODEL.BACKBONE.NAME", "build_dcn_retinanet_resnet_fpn_backbone")
P7 += ("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"], "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"])
RETINANET = (*P7, "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES")


@pytest.mark.parametrize("opts", [(), MASKS, (*RETINANET, 4)])
def test_good_data_pass_without_a_warning(data: Data, warnings: Callable, opts: tuple) -> None:
    data.register_file("my_train", data.coco())
    data.register("my_val", data.records())
    check_data(config("my_train", "my_val", *opts), train=True)
    check_data(config("my_val", "my_train", *opts), train=False)
    assert warnings() == []


# Classes


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("key", ["ROI_HEADS", "RETINANET"])
def test_more_categories_than_classes_do_not_train_the_last_as_background(data: Data, number: int, key: str) -> None:
    opts = RETINANET[:-1] if key == "RETINANET" else ()
    data.register_file("my_train", data.coco())
    told = error_of(config("my_train", "", *opts, f"MODEL.{key}.NUM_CLASSES", number))
    assert f"MODEL.{key}.NUM_CLASSES is {number}, but the data set has 4 categories (ant, bee, cat, dog)" in told
    assert "my_train" in told and f"Set MODEL.{key}.NUM_CLASSES to 4" in told
    told = error_of(config("", "my_train", *opts, f"MODEL.{key}.NUM_CLASSES", number), train=False)
    assert f"NUM_CLASSES is {number}" in told and "can never be found" in told


def test_fewer_categories_than_classes_do_not_stop_the_evaluation_after_hours(data: Data) -> None:
    data.register_file("my_train", data.coco())
    data.register("my_val", data.records())
    for name, cfg_of in (("my_train", ("my_train", "")), ("my_val", ("", "my_val"))):
        told = error_of(config(*cfg_of, "MODEL.ROI_HEADS.NUM_CLASSES", 80), train=bool(cfg_of[0]))
        assert name in told and "stops at the first prediction" in told
        assert "NUM_CLASSES is 80, but the data set has 4 categories (ant, bee, cat, dog)" in told
    check_data(config("", "my_val", "MODEL.ROI_HEADS.NUM_CLASSES", 80), train=False, evaluation=False)


def test_classes_of_the_config_in_another_order_than_the_data_set_gave_an_ap_of_0(data: Data) -> None:
    data.register("my_val", data.records())
    told = error_of(config("", "my_val", "DATASETS.CLASS_NAMES", tuple(reversed(NAMES))), train=False)
    assert "those of DATASETS.CLASS_NAMES are" in told and "is class 0 here, class 3 there" in told
    check_data(config("", "my_val", "DATASETS.CLASS_NAMES", tuple(NAMES)), train=False)


def test_semantic_heads_are_compared_with_the_stuff_classes(data: Data) -> None:
    data.register("my_train", data.records(), stuff_classes=["sky", "sea", "land"])
    opts = ("MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2)
    told = error_of(config("my_train", "", *opts))
    assert "MODEL.SEM_SEG_HEAD.NUM_CLASSES is 2, but the data set has 3 categories (sky, sea, land)" in told
    assert "3 of 3 images have no 'sem_seg_file_name'" in told
    opts = ("MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3)
    records = [record | {"sem_seg_file_name": record["file_name"]} for record in data.records()]
    for record in records:
        del record["annotations"]  # such a model needs none
    data.register("good", records, stuff_classes=["sky", "sea", "land"])
    check_data(config("good", "", *opts), train=True)


@pytest.mark.parametrize("value", [4, -1, 1.5, "1", None])
def test_category_ids_outside_the_classes(data: Data, value: Any) -> None:
    records = data.records()
    records[1]["annotations"][0]["category_id"] = value
    data.register("my_train", records)
    told = error_of(config("my_train"))
    assert "1 of 3 annotations have a 'category_id'" in told
    assert f"annotation 0 of image 2 ({data.folder}/2.png) has {value!r}" in told


def test_a_test_set_with_its_categories_in_another_order_is_refused(data: Data) -> None:
    coco = data.coco()
    data.register_file("my_train", coco)
    coco["categories"] = [{"id": number + 1, "name": name} for number, name in enumerate(["ant", "cat", "dog"])]
    data.register_file("my_val", coco)
    for train in (True, False):
        told = error_of(config("my_train", "my_val"), train)
        assert "its categories are ant, cat, dog, those of my_train are ant, bee, cat, dog" in told
        assert "'cat' is class 1 here, class 2 there" in told and "my_val.json" in told


def test_categories_spelt_otherwise_in_the_test_set_are_a_warning(data: Data, warnings: Callable) -> None:
    data.register("my_train", data.records())
    data.register("my_val", data.records(), thing_classes=["Ant", "Bee", "Cat", "Dog"])
    check_data(config("my_train", "my_val"), train=True)
    assert len(warnings()) == 1 and "those of my_train are ant, bee, cat, dog" in warnings()[0]


def test_a_broken_training_set_is_no_reason_to_refuse_an_evaluation(data: Data, warnings: Callable) -> None:
    data.register_file("my_train", b"{}")
    data.register_file("my_val", data.coco())
    check_data(config("my_train", "my_val"), train=False)
    assert warnings() == ["the categories cannot be compared with those of my_train: KeyError: 'categories'"]


def test_a_torch_data_set_is_left_to_its_author_but_for_the_classes(data: Data) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return iter(data.records())

    data.register("my_train", [])
    DatasetCatalog["my_train"] = Stream
    check_data(config("my_train"), train=True)
    assert "NUM_CLASSES is 3" in error_of(config("my_train", "", "MODEL.ROI_HEADS.NUM_CLASSES", 3))


def test_training_sets_must_have_the_same_categories(data: Data) -> None:
    data.register("my_train", data.records())
    data.register("more", data.records(), thing_classes=["Ant", "Bee", "Cat", "Dog"])
    cfg = config("my_train")
    cfg.DATASETS.TRAIN = ("my_train", "more")
    assert "data set more: its categories are Ant" in error_of(cfg)


# Boxes, masks, keypoints


@pytest.mark.parametrize(
    "box", [[1, 2, 3], [], [1, 2, 3, NAN], [1, 2, 3, float("inf")], ["1", "2", "3", "4"], "1234", 7]
)
def test_boxes_that_are_not_four_numbers_are_refused(data: Data, box: Any) -> None:
    records = data.records()
    records[2]["annotations"][0]["bbox"] = box
    data.register("my_train", records)
    told = error_of(config("my_train"))
    assert f"annotation 0 of image 3 ({data.folder}/3.png) has {box!r}" in told
    assert "1 of 3 annotations have a 'bbox' that is not 4 finite numbers" in told


@pytest.mark.parametrize(
    ("box", "what"),
    [
        ([10, 10, -5, 5], "negative width or height"),
        ([10, 10, 0, 5], "no width or height"),
        ([100, 10, 5, 5], "outside their image"),
        ([-20, 10, 5, 5], "outside their image"),
        ([70, 10, 20, 5], "over the edge"),
    ],
)
def test_odd_boxes_are_counted_and_said_once(data: Data, warnings: Callable, box: list[int], what: str) -> None:
    records = data.records()
    for record in records[:2]:
        record["annotations"].insert(0, record["annotations"][0] | {"bbox": box})
    data.register("my_train", records)
    for _ in range(2):
        check_data(config("my_train"), train=True)
    (line,) = warnings()
    assert "2 of 5 annotations have a 'bbox'" in line and what in line
    assert f"annotation 0 of image 1 ({data.folder}/1.png) has {box}" in line


def test_boxes_of_which_none_is_left_are_refused(data: Data) -> None:
    records = data.records()
    for record in records:  # x, y, width, height, said to be two corners
        record["annotations"][0] |= {"bbox": [30, 40, 20, 10], "bbox_mode": BoxMode.XYXY_ABS}
    data.register("my_train", records)
    assert "3 of 3 annotations have a 'bbox' of negative width" in error_of(config("my_train"))


def test_boxes_need_a_mode_that_detectron2_can_convert(data: Data) -> None:
    records = data.records()
    records[0]["annotations"][0]["bbox_mode"] = BoxMode.XYWH_REL
    del records[1]["annotations"][0]["bbox_mode"]
    data.register("my_train", records)
    assert "2 of 3 annotations have a 'bbox_mode' that is none of BoxMode.XYXY_ABS" in error_of(config("my_train"))


def test_rotated_boxes_have_five_numbers(data: Data, warnings: Callable) -> None:
    records = data.records()
    for record in records:
        record["annotations"][0] |= {"bbox": [40, 30, 20, 10, 45], "bbox_mode": BoxMode.XYWHA_ABS}
    data.register("my_train", records)
    check_data(config("my_train"), train=True)
    assert warnings() == []


@pytest.mark.parametrize(
    ("segmentation", "what"),
    [
        ([], "have no 'segmentation', but MODEL.MASK_ON is True"),
        (None, "have no 'segmentation', but MODEL.MASK_ON is True"),
        ([[1, 2, 3, 4]], "a polygon that is not"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon that is not"),
        ([[1, 2, 3, 4, 5, NAN]], "a polygon that is not"),
        ([1, 2, 3, 4, 5, 6], "a polygon that is not"),
        ("mask.png", "neither polygons nor run lengths"),
    ],
)
def test_masks_that_the_training_would_stop_at(data: Data, segmentation: Any, what: str) -> None:
    records = data.records()
    records[1]["annotations"][0]["segmentation"] = segmentation
    data.register("my_train", records)
    check_data(config("my_train"), train=True)  # a model without masks does not care
    told = error_of(config("my_train", "", *MASKS))
    assert what in told and f"annotation 0 of image 2 ({data.folder}/2.png)" in told


def test_an_empty_segmentation_in_a_file_is_named(data: Data) -> None:
    coco = data.coco()
    coco["annotations"][1]["segmentation"] = []
    data.register_file("my_train", coco)
    told = error_of(config("my_train", "", *MASKS))
    assert "my_train.json" in told and "image 2" in told and "MODEL.MASK_ON False" in told


@pytest.mark.parametrize("polygon", [[10, 10, 30, 40], [10, 10], []])
def test_a_polygon_of_two_points_stopped_the_evaluation_after_the_training(data: Data, polygon: list[int]) -> None:
    data.register_file("my_val", change(data.coco(), "annotations", 1, "segmentation", to=[polygon]))
    told = error_of(config("", "my_val", *MASKS), train=False)
    assert "1 of 3 annotations have a 'segmentation' with a polygon of less than 3 points" in told
    assert "id 12 of image 2" in told
    check_data(config("", "my_val"), train=False)  # the evaluation of boxes does not read it


def test_masks_as_run_lengths_need_the_other_format(data: Data) -> None:
    mask = np.zeros((60, 80), np.uint8, order="F")
    mask[10:40, 10:30] = 1
    records = data.records()
    records[0]["annotations"][0]["segmentation"] = pycocotools.mask.encode(mask)
    records[1]["annotations"].append({"iscrowd": 1} | records[1]["annotations"][0] | {"segmentation": {"size": [1, 1]}})
    data.register("my_train", records)
    told = error_of(config("my_train", "", *MASKS))
    assert "1 of 4 annotations have a 'segmentation' of run lengths, but INPUT.MASK_FORMAT is polygon" in told
    bitmask = (*MASKS, "INPUT.MASK_FORMAT", "bitmask")
    records[1]["annotations"].pop()
    data.register("again", records)
    check_data(config("again", "", *bitmask), train=True)
    records[0]["annotations"][0]["segmentation"] = pycocotools.mask.encode(np.asfortranarray(mask.T))
    data.register("turned", records)
    assert "whose 'size' is not [height, width]" in error_of(config("turned", "", *bitmask))


def test_keypoints_must_be_there_in_number(data: Data) -> None:
    opts = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2)
    opts += ("MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", 1)
    names: dict[str, Any] = {"keypoint_names": ["left", "right"], "keypoint_flip_map": [("left", "right")]}
    records = data.records()
    data.register("without", records, **names)
    assert "3 of 3 annotations have no 'keypoints', but MODEL.KEYPOINT_ON" in error_of(config("without", "", *opts))
    for record in records:
        record["annotations"][0]["keypoints"] = [10, 10, 2, 20, 20, 2]
    data.register("nameless", records)
    assert "keypoint_names" in error_of(config("nameless", "", *opts))
    data.register("good", records, **names)
    check_data(config("good", "", *opts), train=True)
    records[0]["annotations"][0]["keypoints"] = [10, 10, 2]
    data.register("short", records, **names)
    assert "1 of 3 annotations have 'keypoints' that are not 6 finite numbers" in error_of(config("short", "", *opts))
    for record in records:
        record["annotations"][0]["keypoints"] = [0] * 6
    data.register("unseen", records, **names)
    assert "none of its 3 images is left" in error_of(config("unseen", "", *opts))


@pytest.mark.parametrize("emptied", ["without objects", "crowds"])
def test_nothing_left_to_train_on_is_told(data: Data, emptied: str) -> None:
    records = data.records()
    for record in records:
        record["annotations"] = [] if emptied != "crowds" else [record["annotations"][0] | {"iscrowd": 1}]
    data.register("my_train", records)
    told = error_of(config("my_train"))
    assert "none of its 3 images is left" in told and "DATALOADER.FILTER_EMPTY_ANNOTATIONS" in told


def test_no_images_or_annotations_at_all(data: Data) -> None:
    data.register("empty", [])
    assert "data set empty: it has no images" in error_of(config("empty"))
    data.register("bare", [{key: value for key, value in r.items() if key != "annotations"} for r in data.records()])
    assert "3 of 3 images have no list 'annotations'" in error_of(config("bare"))
    data.register("strings", ["1.png"])
    assert "1 of 1 images are not dicts: [0] is '1.png'" in error_of(config("strings"))


# Test sets


@pytest.mark.parametrize("key", ["image_id", "width", "height"])
def test_test_sets_need_what_evaluation_reads(data: Data, key: str) -> None:
    records = data.records()
    del records[1][key]
    data.register("my_train", data.records())
    data.register("my_val", records)
    told = error_of(config("my_train", "my_val"))
    assert f"data set my_val: 1 of 3 images have no '{key}'" in told and "2.png" in told


def test_test_sets_need_names_of_categories(data: Data) -> None:
    DatasetCatalog.register("my_val", data.records)
    data.names.append("my_val")
    told = error_of(config("", "my_val"), train=False)
    assert "MetadataCatalog.get('my_val').thing_classes = [...]" in told


def test_images_of_a_test_set_have_ids_of_their_own(data: Data) -> None:
    records = data.records()
    records[2]["image_id"] = 1
    data.register("my_val", records)
    assert "2 of 3 images share their 'image_id'" in error_of(config("", "my_val"), train=False)


@pytest.mark.parametrize("key", ["iscrowd", "area", "bbox", "segmentation"])
def test_annotation_files_for_tests_need_what_cocos_evaluation_reads(data: Data, key: str) -> None:
    coco = data.coco()
    del coco["annotations"][1][key]
    data.register_file("my_val", coco)
    told = error_of(config("", "my_val", *MASKS), train=False)
    assert f"my_val.json): 1 of 3 annotations have no '{key}', which COCO's evaluation reads: id 12 of image 2" in told
    if key in ("iscrowd", "area"):
        check_data(config("my_val"), train=True)  # the training reads none of them
        check_data(config("", "my_val", *MASKS), train=False, evaluation=False)  # nor may other measures
    check_data(config("", "my_val", *MASKS), train=False, test=False)


def test_annotation_0_which_the_evaluation_never_finds_is_told(data: Data, warnings: Callable) -> None:
    coco = data.coco()
    coco["annotations"][0]["id"] = 0
    data.register_file("my_val", coco)
    check_data(config("", "my_val"), train=False)
    assert len(warnings()) == 1 and "have the id 0" in warnings()[0]


def test_annotations_of_a_test_set_have_numbers_as_ids(data: Data) -> None:
    data.register_file("my_val", change(data.coco(), "annotations", 0, "id", to="a"))
    assert "have no 'id' that is a whole number: id 'a' of image 1" in error_of(config("", "my_val"), train=False)
    check_data(config("my_val"), train=True)


@pytest.mark.parametrize("box", [[10, 10, 0, 5], [100, 10, 5, 5], [-20, 10, 5, 5]])
def test_what_is_said_of_odd_boxes_is_what_detectron2_does(data: Data, box: list[int]) -> None:
    record = data.records()[0]
    mapper = DatasetMapper(is_train=True, augmentations=[ResizeShortestEdge(120, 200)], image_format="BGR")
    record["annotations"][0]["bbox"] = box
    assert len(mapper(record)["instances"]) == 0
    record["annotations"][0]["bbox"] = [10, 10, -5, 5]
    assert mapper(record)["instances"].gt_boxes.tensor.tolist() == [[10, 20, 20, 30]]
    record["annotations"][0]["bbox"] = [70, 10, 20, 5]
    assert mapper(record)["instances"].gt_boxes.tensor.tolist() == [[140, 20, 160, 30]]


def test_a_test_set_without_annotations_is_only_predicted(data: Data, warnings: Callable) -> None:
    coco = data.coco()
    del coco["annotations"]
    data.register_file("my_val", coco)
    check_data(config("", "my_val"), train=False)
    assert "predictions will be written and not evaluated" in warnings()[0]
    assert "no list 'annotations'" in error_of(config("my_val"))


# Files


def change(coco: dict[str, Any], *path: Any, to: Any = None, drop: bool = False) -> dict[str, Any]:
    *steps, last = path
    node: Any = coco
    for step in steps:
        node = node[step]
    if drop:
        del node[last]
    else:
        node[last] = to
    return coco


BROKEN: dict[str, tuple[Callable[[dict], Any], str]] = {
    "empty": (lambda coco: b"", "is empty (0 bytes)"),
    "cut in half": (lambda coco: json.dumps(coco).encode()[:400], "the file ends there, it may have been cut off"),
    "not JSON": (lambda coco: b"<html></html>", "is not JSON: Expecting value at line 1, column 1"),
    "an image": (lambda coco: b"\x89PNG\r\n\x1a\n\xff\xff\xff\xff\xff", "is not JSON: byte"),
    "nested": (lambda coco: b"[" * 200000, "nested too deeply"),
    "a list": (lambda coco: [coco], "the file holds a list, not COCO's object"),
    "no categories": (
        lambda coco: change(coco, "categories", drop=True),
        "no categories: its list 'categories' is missing",
    ),
    "no category": (lambda coco: change(coco, "categories", to=[]), "its list 'categories' is empty"),
    "no images": (lambda coco: change(coco, "images", to=[]), "the file has no images"),
    "no annotations": (lambda coco: change(coco, "annotations", drop=True), "no list 'annotations'"),
    "texts": (
        lambda coco: change(coco, "images", 0, to="1.png"),
        "1 of 3 entries of 'images' are not objects: [0] is '1.png'",
    ),
    "image without id": (lambda coco: change(coco, "images", 1, "id", drop=True), "1 of 3 images have no 'id'"),
    "image without name": (
        lambda coco: change(coco, "images", 1, "file_name", drop=True),
        "images have no 'file_name': id 2",
    ),
    "no width": (
        lambda coco: change(coco, "images", 1, "width", drop=True),
        "no 'width' above 0: id 2, file_name '2.png'",
    ),
    "height 0": (lambda coco: change(coco, "images", 1, "height", to=0), "height 0"),
    "height text": (lambda coco: change(coco, "images", 1, "height", to="60"), "height '60'"),
    "same image id": (lambda coco: change(coco, "images", 1, "id", to=1), "2 of 3 images share their 'id'"),
    "same id": (lambda coco: change(coco, "annotations", 1, "id", to=11), "2 of 3 annotations share their 'id'"),
    "same category": (lambda coco: change(coco, "categories", 1, "id", to=1), "2 of 4 categories share their 'id'"),
    "category nameless": (lambda coco: change(coco, "categories", 1, "name", drop=True), "categories have no 'name'"),
    "no such category": (lambda coco: change(coco, "annotations", 2, "category_id", to=9), "that no category has"),
    "no image": (lambda coco: change(coco, "annotations", 2, "image_id", drop=True), "annotations have no 'image_id'"),
    "ignore": (
        lambda coco: change(coco, "annotations", 2, "ignore", to=1),
        "have 'ignore' set, which Detectron2 refuses",
    ),
    "flat polygon": (
        lambda coco: change(coco, "annotations", 2, "segmentation", to=[1, 2, 3, 4, 5, 6]),
        "neither a list of polygons",
    ),
    "empty box": (lambda coco: change(coco, "annotations", 2, "bbox", to=[]), "'bbox'"),
    "no box": (lambda coco: change(coco, "annotations", 2, "bbox", drop=True), "have no 'bbox'"),
    "box of texts": (lambda coco: change(coco, "annotations", 2, "bbox", to=["1", "2", "3", "4"]), "4 finite numbers"),
    "NaN": (lambda coco: change(coco, "annotations", 2, "bbox", 0, to=NAN), "4 finite numbers"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_annotation_files_are_named_with_what_is_wrong(data: Data, fault: str) -> None:
    make, message = BROKEN[fault]
    data.register_file("my_train", make(data.coco()))
    told = error_of(config("my_train"))
    assert message in told
    assert str(data.folder / "my_train.json") in told


def test_other_annotations_of_other_images_are_a_warning_and_all_of_them_an_error(
    data: Data, warnings: Callable
) -> None:
    coco = change(data.coco(), "annotations", 2, "image_id", to=7)
    data.register_file("my_train", coco)
    check_data(config("my_train"), train=True)
    (line,) = warnings()
    assert "1 of 3 annotations are of an image that the file does not have: id 13 of image 7" in line
    for annotation in coco["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    data.register_file("texts", coco)
    assert "none fits" in error_of(config("texts"))


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "{folder}/secret.png"])
def test_file_names_that_leave_the_folder_of_images_are_told(data: Data, warnings: Callable, name: str) -> None:
    images = data.folder / "images"
    images.mkdir()
    for path in list(data.folder.glob("*.png")):
        path.rename(images / path.name)
    Image.new("RGB", (80, 60)).save(data.folder / "secret.png")
    (images / "a").mkdir()
    name = name.format(folder=data.folder)
    data.register_file("my_train", change(data.coco(), "images", 1, "file_name", to=name), str(images))
    check_data(config("my_train"), train=True)
    (line,) = warnings()
    assert f"1 of 3 file names lead out of the data set's folder {images}" in line and name in line


def test_file_names_that_are_addresses_are_told(data: Data, warnings: Callable) -> None:
    coco = data.coco()
    for image in coco["images"]:
        image["file_name"] = f"http://nowhere.invalid/{image['file_name']}"
    data.register_file("my_train", coco, "")
    check_data(config("my_train"), train=True)
    assert "3 of 3 file names are addresses: id 1, file_name 'http://nowhere.invalid/1.png'" in warnings()[0]
    data.register_file("rooted", coco)
    assert f"{data.folder}/http://nowhere.invalid/1.png: does not exist" in error_of(config("rooted"))


def test_names_from_a_file_do_not_write_lines_of_their_own_into_the_log(data: Data) -> None:
    coco = change(data.coco(), "images", 1, "file_name", to="\x1b[31mx\nINFO all is well.png" + 1000 * "x")
    coco["categories"][0]["name"] = "ant\nINFO" + 1000 * "x"
    data.register_file("my_train", coco)
    told = error_of(config("my_train"))
    assert "\n" not in told and "\x1b" not in told and len(told) < 1000
    told = error_of(config("my_train", "", "MODEL.ROI_HEADS.NUM_CLASSES", 1))
    assert "\n" not in told.replace("\n- ", "") and len(told) < 2000


def test_an_error_of_anyones_loader_gets_the_name_of_the_data_set(data: Data) -> None:
    def fails() -> None:
        raise KeyError("boxes")

    DatasetCatalog.register("my_train", fails)
    data.names.append("my_train")
    with pytest.raises(ValueError, match="data set my_train cannot be loaded: KeyError: 'boxes'") as error:
        check_data(config("my_train"), train=True)
    assert isinstance(error.value.__cause__, KeyError)


# Images


def test_missing_damaged_and_strange_image_files_are_named(data: Data) -> None:
    records = data.records()
    (data.folder / "2.png").write_bytes(b"<html>")
    for number, name in ((0, "nowhere.png"), (2, "")):
        records[number]["file_name"] = str(data.folder / name)
    data.register("my_train", records)
    told = error_of(config("my_train"))
    assert "3 of 3 images that were looked at cannot be used" in told
    assert "nowhere.png: does not exist" in told and "is not a file" in told
    assert f"{data.folder}/2.png: cannot be read: not in a format that Pillow knows" in told


def test_an_image_that_pillow_takes_for_a_bomb_is_named(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data.register("my_train", data.records())
    assert f"{data.folder}/1.png: is too large: Image size (4800 pixels) exceeds limit" in error_of(config("my_train"))


def test_an_image_of_a_kind_that_is_not_read_is_named_before_the_training_meets_it(data: Data) -> None:
    Image.new("F", (80, 60)).save(data.folder / "2.png", format="TIFF")
    Image.new("L", (80, 60)).save(data.folder / "3.png")  # any colours are read
    data.register("my_train", data.records())
    assert f"1 of 3 images that were looked at cannot be used: {data.folder}/2.png: has the mode F" in error_of(
        config("my_train")
    )


def save_turned(path: Path, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 60)).save(path, format=format, exif=exif)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_sizes_are_those_of_the_displayed_image(data: Data, format: str) -> None:
    save_turned(data.folder / "2.png", format)
    records = data.records()
    data.register("stored", records)
    told = error_of(config("stored"))
    assert "1 of 3 images that were looked at cannot be used" in told
    assert f"{data.folder}/2.png: is 60 x 80 pixels (stored as 80 x 60" in told
    assert "the annotations say width x height = 80 x 60" in told
    records[1] |= {"width": 60, "height": 80}
    data.register("displayed", records)
    check_data(config("displayed"), train=True)


def test_an_image_of_another_size_is_told_before_the_training_meets_it(data: Data) -> None:
    Image.new("RGB", (80, 61)).save(data.folder / "3.png")
    data.register_file("my_val", data.coco())
    told = error_of(config("", "my_val"), train=False)
    assert "3.png: is 80 x 61 pixels, but the annotations say width x height = 80 x 60" in told


def test_of_many_images_a_sample_is_looked_at(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "ALL", 20)
    monkeypatch.setattr(image_files, "SAMPLE", 7)
    opened: list[str] = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path: (opened.append(path), real(path))[1])
    records = [copy.deepcopy(data.records()[0]) | {"image_id": number} for number in range(21)]
    data.register("large", records)
    data.register("small", records[:20])
    check_data(config("large"), train=True)
    assert len(opened) == 7
    check_data(config("small"), train=True)
    assert len(opened) == 7 + 20


# Proposals


class _RunsCode:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("victim",)


def test_files_of_proposals_cannot_run_code(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data.register("my_train", data.records())
    path = tmp_path / "proposals.pkl"
    boxes = [np.array([[1, 2, 3, 4.0]])] * 3
    good = {"ids": [1, 2, 3], "boxes": boxes, "objectness_logits": [np.zeros(1)] * 3, "bbox_mode": BoxMode.XYXY_ABS}
    path.write_bytes(pickle.dumps(good | {"more": _RunsCode()}))
    proposals = ("MODEL.LOAD_PROPOSALS", True, "DATASETS.PROPOSAL_FILES_TRAIN")
    cfg = config("my_train", "", *proposals, (str(path),))
    told = error_of(cfg)
    assert "DATASETS.PROPOSAL_FILES_TRAIN" in told and f"{path} is refused: it names posix.mkdir" in told
    assert not (tmp_path / "victim").exists()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(good, protocol=protocol))
        check_data(cfg, train=True)
    dicts = get_detection_dataset_dicts("my_train", proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN)
    assert dicts[0]["proposal_boxes"].shape == (1, 4)


def test_files_of_proposals_that_are_none_are_named(data: Data, tmp_path: Path) -> None:
    data.register("my_train", data.records())
    path = tmp_path / "proposals.pkl"
    proposals = ("MODEL.LOAD_PROPOSALS", True, "DATASETS.PROPOSAL_FILES_TRAIN")
    cfg = config("my_train", "", *proposals, (str(path),))
    with pytest.raises(FileNotFoundError, match="PROPOSAL_FILES_TRAIN: there is no file .*proposals.pkl"):
        check_data(cfg, train=True)
    lists = {"indexes": [1], "boxes": [1], "scores": [1, 2]}
    for content, message in (
        (b"", "is refused"),
        (pickle.dumps([1]), "holds a list"),
        (pickle.dumps({"ids": [1]}), "has no list 'boxes'"),
        (pickle.dumps(lists), "has lists of different lengths: {'indexes': 1, 'boxes': 1, 'scores': 2}"),
    ):
        path.write_bytes(content)
        assert f"{path} {message}" in error_of(cfg)
    assert "names 0 files, but DATASETS.TRAIN 1 data sets" in error_of(config("my_train", "", *proposals, ()))


# Once


def test_data_are_loaded_once_and_handed_on(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str) -> list[dict[str, Any]]:
        loaded.append(name)
        return data.records()

    for name in ("my_train", "my_val"):
        data.register(name, [])
        DatasetCatalog[name] = lambda name=name: load(name)
    cfg = config("my_train", "my_val")
    check_data(cfg, train=True)
    check_data(cfg, train=True)
    check_data(cfg, train=False)
    assert loaded == ["my_train", "my_val"]
    assert len(get_detection_dataset_dicts("my_train")) == 3
    assert loaded == ["my_train", "my_val"], "the training takes what was loaded already"
    DatasetCatalog.get("my_train")
    assert loaded == ["my_train", "my_val", "my_train"], "and only once: whoever comes next may change what he gets"


def test_an_annotation_file_is_parsed_once(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    data.register_file("my_train", data.coco())
    expected = DatasetCatalog.get("my_train")
    original, parsed = json.loads, []
    monkeypatch.setattr(json, "loads", lambda text, **options: (parsed.append(len(text)), original(text, **options))[1])
    check_data(config("my_train"), train=True)
    assert len(parsed) == 1
    assert DatasetCatalog.get("my_train") == expected, "what was loaded for the check"
    assert len(parsed) == 1
    assert DatasetCatalog.get("my_train") == expected, "what the next one loads"
    assert len(parsed) == 2


def test_a_loader_may_read_another_file_than_the_one_that_was_checked(data: Data) -> None:
    data.register_file("other", data.coco())
    data.register_file("my_train", data.coco() | {"images": data.coco()["images"][:2]})
    other = DatasetCatalog["other"]
    DatasetCatalog.data["my_train"] = other
    check_data(config("my_train"), train=True)
    assert DatasetCatalog.get("my_train") == other()


def test_after_a_loader_that_fails_pycocotools_is_as_before(data: Data) -> None:
    before = pycocotools.coco.COCO
    data.register_file("my_train", data.coco())
    DatasetCatalog.data["my_train"] = lambda: 1 / 0
    assert "cannot be loaded: ZeroDivisionError" in error_of(config("my_train"))
    assert pycocotools.coco.COCO is before


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_that_pycocotools_cannot_read_is_refused(data: Data, encoding: str) -> None:
    data.register_file("my_train", json.dumps(data.coco()).encode(encoding))
    with pytest.raises(ValueError):
        pycocotools.coco.COCO(str(data.folder / "my_train.json"))
    told = error_of(config("my_train"))
    assert "my_train.json" in told and ("byte order mark" if encoding == "utf-8-sig" else "is not JSON: ") in told


def test_a_packed_file_is_refused(data: Data) -> None:
    data.register_file("my_train", gzip.compress(json.dumps(data.coco()).encode()))
    assert "it is compressed (gzip), unpack it" in error_of(config("my_train"))


def test_data_for_training_and_tests_are_still_handed_on_to_the_training(data: Data) -> None:
    calls: list[int] = []
    data.register("both", [])
    DatasetCatalog["both"] = lambda: (calls.append(1), data.records())[1]
    check_data(config("both", "both"), train=True)
    DatasetCatalog.get("both")
    assert len(calls) == 1


def test_a_changed_file_or_model_is_checked_again(data: Data) -> None:
    data.register_file("my_train", data.coco())
    check_data(config("my_train"), train=True)
    assert "NUM_CLASSES is 3" in error_of(config("my_train", "", "MODEL.ROI_HEADS.NUM_CLASSES", 3))
    (data.folder / "my_train.json").write_text("{}")
    assert "has no images" in error_of(config("my_train"))


def test_without_a_training_set_there_is_no_training(data: Data) -> None:
    assert error_of(config()) == "DATASETS.TRAIN names no data set"
    check_data(config(), train=False)


def test_the_main_process_speaks_and_the_others_stop_with_it(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    data.register("my_train", [])
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    check_data(config("my_train"), train=True)  # it looks at nothing
    monkeypatch.setattr(comm, "all_gather", lambda told: ["ValueError: it has no images", told])
    assert "the main process found this in the data: ValueError: it has no images" in error_of(config("my_train"))


TWO_PROCESSES = """
from pathlib import Path

from detectron2.engine import launch

def main():
    from detectron2.data import DatasetCatalog
    from detectron2.utils import comm
    from dcn_d2.config import load_config
    from dcn_d2.data import check_data
    check_data(load_config("", ["DATASETS.TRAIN", ("nuclei_train",), "MODEL.ROI_HEADS.NUM_CLASSES", 1]), train=True)
    DatasetCatalog.register("empty", list)
    try:
        check_data(load_config("", ["DATASETS.TRAIN", ("empty",)]), train=True)
    except ValueError as error:
        Path(f"told-{comm.get_rank()}").write_text(str(error))  # two processes in one stream mix their lines

if __name__ == "__main__":
    launch(main, 2, dist_url="auto")
"""


@pytest.mark.slow
def test_two_processes_stop_with_the_same_words(tmp_path: Path, project: Path) -> None:
    (tmp_path / "job.py").write_text(TWO_PROCESSES)
    variables = {"PYTHONPATH": str(project), "XDG_CACHE_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "job.py")],
        cwd=tmp_path,
        env=os.environ | variables | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = [(tmp_path / f"told-{rank}").read_text() for rank in range(2)]
    assert told[0] == "data set empty: it has no images"
    assert told[1] == f"the main process found this in the data: ValueError: {told[0]}"
