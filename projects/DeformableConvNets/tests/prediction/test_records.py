# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What is written about an image, and the ids of its categories."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances, RotatedBoxes

from dcn_d2.engine import load_config
from dcn_d2.prediction.records import Categories, check_gives_instances, detections_of, find_categories, instances_of


@pytest.fixture
def cfg() -> Iterator[CfgNode]:
    """A model for a data set of three classes, whose ids are 7, 3 and 5."""
    MetadataCatalog.get("three").set(
        thing_classes=["a", "b", "c"], thing_dataset_id_to_contiguous_id={7: 0, 3: 1, 5: 2}
    )
    cfg = load_config("", ["MODEL.ROI_HEADS.NUM_CLASSES", 3, "DATASETS.TEST", ("three",)])
    yield cfg
    MetadataCatalog.remove("three")


def coco(**ids: int) -> list[dict[str, object]]:
    return [{"id": key, "name": name} for name, key in ids.items()]


def test_ids_are_those_of_the_data_set(cfg: CfgNode) -> None:
    assert find_categories(cfg, []) == Categories([7, 3, 5], ["a", "b", "c"])


def test_ids_of_a_coco_file_are_found_by_name(cfg: CfgNode) -> None:
    assert find_categories(cfg, coco(c=1, a=2, b=3)) == Categories([2, 3, 1], ["a", "b", "c"])
    for other in (coco(c=1, a=2), coco(c=1, a=2, d=3), coco(a=1, b=2, c=3, d=4)):
        with pytest.raises(ValueError, match=r"the model has 3 classes \(a, b, c\), and the COCO file"):
            find_categories(cfg, other)


def test_without_known_names_the_order_of_ids_counts(cfg: CfgNode) -> None:
    cfg.DATASETS.TEST = ()
    cfg.DATASETS.TRAIN = ()
    assert find_categories(cfg, []) == Categories([0, 1, 2], ["class 0", "class 1", "class 2"])
    assert find_categories(cfg, coco(z=9, y=4, x=6)) == Categories([4, 6, 9], ["y", "x", "z"])
    with pytest.raises(ValueError, match="the model has 3 classes"):
        find_categories(cfg, coco(z=9))


def test_names_that_the_weights_say_count_most(cfg: CfgNode) -> None:
    assert find_categories(cfg, coco(z=9, y=4, x=6), ["x", "y", "z"]) == Categories([6, 4, 9], ["x", "y", "z"])
    assert find_categories(cfg, [], ["x", "y", "z"]) == Categories([0, 1, 2], ["x", "y", "z"])
    assert find_categories(cfg, [], ["a", "b", "c"]).ids == [7, 3, 5]


def test_ids_of_the_embedded_data_set(cfg: CfgNode, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg.DATASETS.TEST, cfg.MODEL.ROI_HEADS.NUM_CLASSES = ("nuclei_val",), 1
    assert find_categories(cfg, []).names == ["nucleus"]
    assert find_categories(cfg, []).ids == list(MetadataCatalog.get("nuclei_val").thing_dataset_id_to_contiguous_id)
    assert "nuclei_val" in DatasetCatalog


def test_models_without_detections_are_refused(cfg: CfgNode) -> None:
    check_gives_instances(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    with pytest.raises(ValueError, match="MODEL.META_ARCHITECTURE is SemanticSegmentor, which detects no objects"):
        check_gives_instances(cfg)
    found = Instances((10, 20), pred_boxes=RotatedBoxes(torch.zeros(1, 5)))
    with pytest.raises(ValueError, match="RotatedBoxes"):
        detections_of(found, 1, Categories([1], ["a"]))


def test_detections_become_records_and_back() -> None:
    found = Instances((10, 20))
    found.pred_boxes = Boxes(torch.tensor([[1.0, 2, 5, 7], [0, 0, 20, 10]]))
    found.scores, found.pred_classes = torch.tensor([0.5, 0.25]), torch.tensor([1, 0])
    found.pred_masks = torch.zeros(2, 10, 20, dtype=torch.bool)
    found.pred_masks[0, 2:7, 1:5] = True
    found.pred_keypoints = torch.full((2, 3, 3), 4.0)
    categories = Categories([70, 30], ["a", "b"])
    first, second = detections_of(found, "x", categories)
    assert (first["image_id"], first["category_id"], first["bbox"], first["score"]) == ("x", 30, [1, 2, 4, 5], 0.5)
    assert second["category_id"] == 70 and first["keypoints"] == [3.5, 3.5, 4] * 3
    assert found.pred_keypoints.eq(4).all(), "what the model gave is not changed"
    back = instances_of({"height": 10, "width": 20, "detections": [first, second]}, categories)
    assert torch.equal(back.pred_boxes.tensor, found.pred_boxes.tensor)
    assert torch.equal(back.pred_masks, found.pred_masks)
    assert back.pred_classes.tolist() == [1, 0] and back.scores.tolist() == [0.5, 0.25]
    assert len(instances_of({"height": 10, "width": 20, "detections": []}, categories)) == 0
