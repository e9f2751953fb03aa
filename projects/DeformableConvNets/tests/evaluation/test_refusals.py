# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What cannot be evaluated is told in words before anything runs."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from PIL import Image
from torch import nn

from dcn_d2.data import check_data, checks
from dcn_d2.data.findings import Findings
from dcn_d2.data.label_files import check_label_files
from dcn_d2.engine import DCNTrainer
from dcn_d2.evaluation import check_evaluators

from .sets import Sets
from .test_evaluators import MASKS, PANOPTIC, SEMANTIC, config

KEYPOINTS = ("MODEL.KEYPOINT_ON", True)
PROPOSALS = ("MODEL.META_ARCHITECTURE", "ProposalNetwork")
RETINANET = ("MODEL.META_ARCHITECTURE", "RetinaNet")


@META_ARCH_REGISTRY.register()
class AnythingNet(nn.Module):
    """An architecture of which nothing is known."""


@pytest.fixture
def all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.util.find_spec
    known = ("lvis", "panopticapi", "cityscapesscripts")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name in known else installed(name))


def typed(sets: Sets, kind: str, **metadata: Any) -> str:
    """A data set with another evaluator type than the one that it was made with."""
    name = sets.coco()
    del MetadataCatalog.get(name).evaluator_type
    here = str(sets.folder)
    files = {"gt_dir": here, "dirname": here, "panoptic_json": here, "panoptic_root": here}
    MetadataCatalog.get(name).set(evaluator_type=kind, **files, **metadata)
    return name


@pytest.mark.parametrize(
    "kind, keys, message",
    [
        ("sem_seg", MASKS, "(type sem_seg) needs a semantic segmentation, but the model gives boxes of objects, masks"),
        ("cityscapes_sem_seg", (), "needs a semantic segmentation, but the model gives boxes of objects"),
        ("cityscapes_instance", (), "needs masks of objects, but the model gives boxes of objects (MODEL.META_ARCH"),
        ("coco_panoptic_seg", MASKS, "(type coco_panoptic_seg) needs a semantic segmentation, but the model gives"),
        ("coco_panoptic_seg", SEMANTIC, "needs boxes of objects, but the model gives a semantic segmentation"),
        (
            "coco_panoptic_seg",
            (*PANOPTIC, "MODEL.PANOPTIC_FPN.COMBINE.ENABLED", False),
            "needs a panoptic segmentation, but the model gives .*set MODEL.PANOPTIC_FPN.COMBINE.ENABLED True, or TEST",
        ),
        ("coco", SEMANTIC, "needs boxes of objects or proposals, but the model gives a semantic segmentation"),
        ("lvis", SEMANTIC, "needs boxes of objects or proposals, but the model gives a semantic segmentation"),
        (
            "pascal_voc",
            PROPOSALS,
            "needs boxes of objects, but the model gives proposals (MODEL.META_ARCHITECTURE Prop",
        ),
    ],
)
@pytest.mark.usefixtures("all_installed")
def test_models_that_do_not_give_what_is_measured(kind: str, keys: tuple, message: str, sets: Sets) -> None:
    cfg = config(typed(sets, kind), *keys)
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=f"data set tiny_coco: its evaluation .*{pattern}|{pattern}"):
        DCNTrainer.test(cfg, nn.Identity())
    if kind != "coco_panoptic_seg":
        cfg.MODEL.META_ARCHITECTURE = "AnythingNet"  # it may give everything
        if not kind.startswith("cityscapes"):
            check_evaluators(cfg, cfg.DATASETS.TEST)


@pytest.mark.parametrize(
    "kind, keys, message",
    [
        ("lvis", (), "the package lvis .*pip install --no-deps lvis"),
        (
            "coco_panoptic_seg",
            PANOPTIC,
            "pip install git.https://github.com/cocodataset/panopticapi.*PANOPTIC_QUALITY F",
        ),
        ("cityscapes_instance", MASKS, "the package cityscapesscripts .*pip install cityscapesscripts"),
        ("cityscapes_sem_seg", SEMANTIC, "the package cityscapesscripts .*pip install cityscapesscripts"),
    ],
)
def test_packages_that_are_missing(
    kind: str, keys: tuple, message: str, sets: Sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cfg = config(typed(sets, kind), *keys)
    for refused in (
        lambda: DCNTrainer.check(cfg, train=False),
        lambda: DCNTrainer.test(cfg, nn.Identity()),
        lambda: DCNTrainer.build_evaluator(cfg, "tiny_coco"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    if kind == "coco_panoptic_seg":
        cfg.TEST.PANOPTIC_QUALITY = False
        DCNTrainer.check(cfg, train=False)


@pytest.mark.usefixtures("all_installed")
def test_cityscapes_on_several_machines(sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 8)
    monkeypatch.setattr(comm, "get_local_size", lambda: 4)
    with pytest.raises(ValueError, match=r"Cityscapes' evaluation works on one machine only, but this job runs on 2"):
        check_evaluators(config(typed(sets, "cityscapes_instance"), *MASKS), ["tiny_coco"])


def test_cityscapes_with_other_categories_or_without_truth(sets: Sets) -> None:
    pytest.importorskip("cityscapesscripts", reason="the package cityscapesscripts is not installed")
    name = typed(sets, "cityscapes_instance", thing_classes=["car", "unicorn"])
    with pytest.raises(ValueError, match="Cityscapes' evaluation does not know its categories unicorn"):
        check_evaluators(config(name, *MASKS), [name])
    other = Sets(sets.folder / "other")
    other.folder.mkdir()
    name = other.cityscapes("instance_seg")
    for path in other.folder.rglob("*_instanceIds.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="reads .*_gtFine_instanceIds.png, and there is no such file"):
        check_evaluators(config(name, *MASKS), [name])
    other.remove()


@pytest.mark.usefixtures("all_installed")
def test_files_that_are_missing(sets: Sets, tmp_path: Path) -> None:
    name = sets.panoptic()
    metadata = MetadataCatalog.get(name)
    (tmp_path / "tiny_panoptic_panoptic.json").unlink()
    with pytest.raises(FileNotFoundError, match="reads panoptic_json, .*tiny_panoptic_panoptic.json, which does not"):
        check_evaluators(config(name, *PANOPTIC), [name])
    del metadata.panoptic_json
    with pytest.raises(ValueError, match="its metadata have no panoptic_json, which its evaluation"):
        check_evaluators(config(name, *PANOPTIC), [name])
    name = sets.voc()
    MetadataCatalog.get(name).__dict__["dirname"] = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="data set voc_tiny: its images and annotations are expected at .*nowh"):
        DCNTrainer.check(config(name), train=False)


@pytest.mark.usefixtures("all_installed")
@pytest.mark.parametrize(
    "kind, keys, message",
    [
        ("sem_seg", SEMANTIC, "it has no stuff_classes in its metadata, which evaluation needs"),
        ("sem_seg", SEMANTIC, "3 of 3 images have no 'sem_seg_file_name', which evaluation needs"),
        ("coco_panoptic_seg", PANOPTIC, "3 of 3 images have no 'sem_seg_file_name', which evaluation needs"),
        ("coco_panoptic_seg", PANOPTIC, "it has no stuff_dataset_id_to_contiguous_id in its metadata"),
        ("pascal_voc", (), "it has no split in its metadata, which evaluation needs"),
    ],
)
def test_data_that_an_evaluator_cannot_read(kind: str, keys: tuple, message: str, sets: Sets) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_data(config(typed(sets, kind), *keys), train=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda labels: labels + 2, r"1.png: has the labels \[4\]; MODEL.SEM_SEG_HEAD.NUM_CLASSES is 3, .* are 255"),
        (lambda labels: labels[:-4], "1.png: is 128 x 92 pixels, but its image is 128 x 96"),
        (lambda labels: np.stack([labels] * 3, axis=2), "1.png: has 3 channels; one was expected"),
        (None, "1.png: does not exist"),
    ],
)
def test_labels_of_pixels_that_would_fail_in_the_middle(change: Any, message: str, sets: Sets) -> None:
    name = sets.semantic()
    cfg = config(name, *SEMANTIC)
    check_data(cfg, train=False)
    checks._checked.clear()
    path = sets.folder / "labels" / "1.png"
    labels = np.where(np.asarray(Image.open(path)) == 255, 2, np.asarray(Image.open(path)))
    path.unlink()
    if change is None:
        DatasetCatalog.get(name)  # Detectron2 looks for the files when it loads the data set
        records = [{"file_name": "1.jpg", "sem_seg_file_name": str(path), "height": 96, "width": 128}]
        findings = Findings("data")
        check_label_files(records, ("KEY", 3), 255, findings, train=False)
        assert message in findings.errors[0]
        return
    Image.fromarray(change(labels).astype(np.uint8)).save(path)
    with pytest.raises(ValueError, match=f"files of labels that were looked at cannot be used: .*{message}"):
        check_data(cfg, train=False)


def test_labels_in_a_palette_train_as_grey_levels(sets: Sets) -> None:
    name = sets.semantic()
    path = sets.folder / "labels" / "1.png"
    image = Image.open(path).convert("P")
    image.putdata(list(np.minimum(np.asarray(Image.open(path)), 2).ravel()))
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    image.save(path)
    cfg = config(name, *SEMANTIC, "DATASETS.TRAIN", (name,))
    check_data(cfg, train=False)  # it reads the numbers
    with pytest.raises(ValueError, match=r"1.png: has the labels \[75\] \(its colours as grey levels\)"):
        check_data(cfg, train=True)


def test_pascal_voc_needs_no_masks_of_a_model_that_has_some(sets: Sets, caplog: pytest.LogCaptureFixture) -> None:
    name = sets.voc()
    cfg = config(name, *MASKS)
    check_data(cfg, train=False)
    caplog.set_level(logging.WARNING, "dcn_d2")
    DCNTrainer.check(cfg, train=False)
    assert "its evaluation (type pascal_voc) does not measure the model's masks of objects" in caplog.text


def test_retinanet_is_not_asked_for_masks(sets: Sets) -> None:
    name = sets.coco()
    evaluator = DCNTrainer.build_evaluator(config(name, *RETINANET, *MASKS, folder=sets.folder), name)
    assert evaluator._tasks == ["bbox"]
