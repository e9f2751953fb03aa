# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Tiny data sets of each kind: photographs of rectangles, which lie on the sky."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import (
    load_sem_seg,
    register_coco_instances,
    register_coco_panoptic_separated,
    register_pascal_voc,
)
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image

HEIGHT, WIDTH = 96, 128
CLASSES = ("car", "person")  # Cityscapes knows them too


class Thing(NamedTuple):
    """A rectangle in an image; corners in pixels."""

    category: int
    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def box(self) -> list[int]:
        """As (x, y, width, height)."""
        return [self.x0, self.y0, self.x1 - self.x0, self.y1 - self.y0]

    @property
    def area(self) -> int:
        return self.box[2] * self.box[3]

    @property
    def polygon(self) -> list[int]:
        return [self.x0, self.y0, self.x1, self.y0, self.x1, self.y1, self.x0, self.y1]

    @property
    def mask(self) -> np.ndarray:
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[self.y0 : self.y1, self.x0 : self.x1] = True
        return mask


IMAGES: tuple[tuple[Thing, ...], ...] = (
    (Thing(0, 10, 10, 60, 50), Thing(1, 70, 20, 110, 90)),
    (Thing(1, 5, 40, 45, 90),),
    (Thing(0, 60, 30, 120, 80), Thing(0, 4, 4, 40, 30)),
)


def write_images(folder: Path, names: Sequence[str]) -> None:
    """Writes the image of each name, a path below `folder`."""
    for name, things in zip(names, IMAGES):
        pixels = np.full((HEIGHT, WIDTH, 3), (250, 200, 100), np.uint8)
        for thing in things:
            pixels[thing.mask] = (40 + 60 * thing.category, 40, 120)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)


def objects(**more: Any) -> dict[str, Any]:
    """Annotations in COCO's format; `more` for each annotation."""
    numbered = [(image, thing) for image, things in enumerate(IMAGES) for thing in things]
    return {
        "images": [
            {"id": i + 1, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(len(IMAGES))
        ],
        "annotations": [
            {
                "id": number + 1,
                "image_id": image + 1,
                "category_id": thing.category + 1,
                "bbox": thing.box,
                "area": thing.area,
                "iscrowd": 0,
                "segmentation": [thing.polygon],
                **more,
            }
            for number, (image, thing) in enumerate(numbered)
        ],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }


class Sets:
    """Registers data sets in a folder, until `remove`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def remove(self) -> None:
        for name in self.names:
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)

    def _write(self, name: str, content: Any) -> str:
        (self.folder / name).write_text(json.dumps(content))
        return str(self.folder / name)

    def coco(self, name: str = "tiny_coco") -> str:
        write_images(self.folder / "images", [f"{i}.jpg" for i in range(len(IMAGES))])
        register_coco_instances(name, {}, self._write(f"{name}.json", objects()), str(self.folder / "images"))
        self.names.append(name)
        return name

    def lvis(self, name: str = "lvis_v1_tiny") -> str:
        """In LVIS's format: an image also lists categories that it has not, and those that are not all marked."""
        from detectron2.data.datasets.lvis import load_lvis_json

        write_images(self.folder / "images", [f"{i}.jpg" for i in range(len(IMAGES))])
        content = objects()
        for image in content["images"]:
            address = f"http://nowhere/images/{image['file_name']}"
            image |= {"neg_category_ids": [], "not_exhaustive_category_ids": [], "coco_url": address}
        for category, frequency in zip(content["categories"], "fr"):
            category |= {"frequency": frequency, "image_count": 2, "synset": category["name"]}
        path, root = self._write(f"{name}.json", content), f"{self.folder}/"  # it is put before the address's end
        DatasetCatalog.register(name, lambda: load_lvis_json(path, root))
        MetadataCatalog.get(name).set(
            json_file=path, image_root=root, evaluator_type="lvis", thing_classes=list(CLASSES)
        )
        self.names.append(name)
        return name

    def voc(self, name: str = "voc_tiny", year: int = 2012) -> str:
        root = self.folder / "VOC"
        write_images(root / "JPEGImages", [f"{i:06}.jpg" for i in range(len(IMAGES))])
        (root / "ImageSets" / "Main").mkdir(parents=True)
        (root / "Annotations").mkdir()
        (root / "ImageSets" / "Main" / "test.txt").write_text("".join(f"{i:06}\n" for i in range(len(IMAGES))))
        for i, things in enumerate(IMAGES):
            found = "".join(
                f"<object><name>{CLASSES[thing.category]}</name><pose>Left</pose><truncated>0</truncated>"
                f"<difficult>0</difficult><bndbox><xmin>{thing.x0 + 1}</xmin><ymin>{thing.y0 + 1}</ymin>"
                f"<xmax>{thing.x1}</xmax><ymax>{thing.y1}</ymax></bndbox></object>"
                for thing in things
            )
            size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
            (root / "Annotations" / f"{i:06}.xml").write_text(f"<annotation>{size}{found}</annotation>")
        register_pascal_voc(name, str(root), "test", year, class_names=CLASSES)
        MetadataCatalog.get(name).evaluator_type = "pascal_voc"
        self.names.append(name)
        return name

    def semantic(self, name: str = "tiny_semantic") -> str:
        """Sky, cars and persons as kinds of pixels."""
        images, labels = self.folder / "images", self.folder / "labels"
        write_images(images, [f"{i}.jpg" for i in range(len(IMAGES))])
        self._write_labels(labels, [(1 + thing.category) for things in IMAGES for thing in things], sky=0)
        DatasetCatalog.register(name, lambda: load_sem_seg(str(labels), str(images)))
        MetadataCatalog.get(name).set(
            stuff_classes=["sky", *CLASSES],
            ignore_label=255,
            image_root=str(images),
            sem_seg_root=str(labels),
            evaluator_type="sem_seg",
        )
        self.names.append(name)
        return name

    def _write_labels(self, folder: Path, values: Sequence[int], sky: int) -> None:
        left = iter(values)
        folder.mkdir(exist_ok=True)
        for i, things in enumerate(IMAGES):
            labels = np.full((HEIGHT, WIDTH), sky, np.uint8)
            labels[:2] = 255  # to be ignored
            for thing in things:
                labels[thing.mask] = next(left)
            Image.fromarray(labels).save(folder / f"{i}.png")

    def panoptic(self, name: str = "tiny_panoptic") -> str:
        """As Detectron2 registers COCO's panoptic data for its PanopticFPN; category 3 is the sky."""
        images, labels, panoptic = (self.folder / kind for kind in ("images", "labels", "panoptic"))
        write_images(images, [f"{i}.jpg" for i in range(len(IMAGES))])
        self._write_labels(labels, [0 for things in IMAGES for _ in things], sky=1)  # 0: things
        panoptic.mkdir()
        annotations = []
        for i, things in enumerate(IMAGES):
            ids = segments_of(things)
            Image.fromarray(np.stack([ids, np.zeros_like(ids), np.zeros_like(ids)], axis=2)).save(panoptic / f"{i}.png")
            sky = {"id": 100, "category_id": 3, "area": int((ids == 100).sum()), "iscrowd": 0, "bbox": [0, 0, 1, 1]}
            segments = [
                sky | {"id": number + 1, "category_id": thing.category + 1, "area": thing.area, "bbox": thing.box}
                for number, thing in enumerate(things)
            ]
            annotations.append({"image_id": i + 1, "file_name": f"{i}.png", "segments_info": [*segments, sky]})
        content = objects()
        instances = self._write(f"{name}.json", content)
        kinds = [category | {"isthing": 1} for category in content["categories"]]
        content |= {"annotations": annotations, "categories": [*kinds, {"id": 3, "name": "sky", "isthing": 0}]}
        metadata = {
            "thing_classes": list(CLASSES),
            "stuff_classes": ["things", "sky"],
            "thing_dataset_id_to_contiguous_id": {1: 0, 2: 1},
            "stuff_dataset_id_to_contiguous_id": {0: 0, 3: 1},
        }
        register_coco_panoptic_separated(
            name,
            metadata,
            str(images),
            str(panoptic),
            self._write(f"{name}_panoptic.json", content),
            str(labels),
            instances,
        )
        self.names += [f"{name}_separated", f"{name}_stuffonly"]
        return f"{name}_separated"

    def cityscapes(self, task: str) -> str:
        """In Cityscapes' layout; `task` is "instance_seg" or "sem_seg"."""
        from cityscapesscripts.helpers.labels import labels, name2label
        from detectron2.data.datasets.cityscapes import load_cityscapes_instances, load_cityscapes_semantic

        images, truth, name = self.folder / "leftImg8bit", self.folder / "gtFine", f"tiny_cityscapes_{task}"
        stems = [f"town/town_{i:06}_000019" for i in range(len(IMAGES))]
        write_images(images, [f"{stem}_leftImg8bit.png" for stem in stems])
        (truth / "town").mkdir(parents=True)
        for stem, things in zip(stems, IMAGES):
            ids = np.full((HEIGHT, WIDTH), name2label["sky"].id, np.uint16)
            train_ids = np.full((HEIGHT, WIDTH), name2label["sky"].trainId, np.uint8)
            for number, thing in enumerate(things):
                label = name2label[CLASSES[thing.category]]
                ids[thing.mask] = 1000 * label.id + number
                train_ids[thing.mask] = label.trainId
            label_ids = np.where(ids >= 1000, ids // 1000, ids).astype(np.uint8)
            for kind, pixels in (("instanceIds", ids), ("labelIds", label_ids), ("labelTrainIds", train_ids)):
                Image.fromarray(pixels).save(truth / f"{stem}_gtFine_{kind}.png")
            found = [{"label": CLASSES[t.category], "polygon": np.reshape(t.polygon, (4, 2)).tolist()} for t in things]
            content = {"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": found}
            (truth / f"{stem}_gtFine_polygons.json").write_text(json.dumps(content))
        load = load_cityscapes_semantic if task == "sem_seg" else load_cityscapes_instances
        DatasetCatalog.register(name, lambda: load(str(images), str(truth)))
        trained = {label.trainId: label.name for label in labels if 0 <= label.trainId < 255}
        MetadataCatalog.get(name).set(
            image_dir=str(images),
            gt_dir=str(truth),
            thing_classes=[label.name for label in labels if label.hasInstances and not label.ignoreInEval],
            stuff_classes=[trained[number] for number in sorted(trained)],
            evaluator_type="cityscapes_sem_seg" if task == "sem_seg" else "cityscapes_instance",
            ignore_label=255,
        )
        self.names.append(name)
        return name


def segments_of(things: Sequence[Thing]) -> np.ndarray:
    """The number of the segment that each pixel is of: 1, 2, … for things, 100 for the sky."""
    ids = np.full((HEIGHT, WIDTH), 100, np.uint8)
    for number, thing in enumerate(things):
        ids[thing.mask] = number + 1
    return ids


def perfect_instances(things: Sequence[Thing]) -> Instances:
    """What a model would predict that makes no mistake."""
    found = Instances((HEIGHT, WIDTH))
    boxes = [[thing.x0, thing.y0, thing.x1, thing.y1] for thing in things]
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.linspace(0.9, 0.8, len(things))
    found.pred_classes = torch.tensor([thing.category for thing in things], dtype=torch.int64)
    masks = np.stack([thing.mask for thing in things]) if things else np.zeros((0, HEIGHT, WIDTH), bool)
    found.pred_masks = BitMasks(torch.from_numpy(masks)).tensor
    return found


def scores_of(labels: np.ndarray, classes: int) -> torch.Tensor:
    """Scores (classes, height, width) that are highest for the given labels."""
    return torch.nn.functional.one_hot(torch.from_numpy(labels.astype(np.int64)), classes).permute(2, 0, 1).float()
