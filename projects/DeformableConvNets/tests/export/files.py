# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A small detector with a config, weights, images and annotations, and its exported files."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
import torch
from detectron2.config import CfgNode
from PIL import Image

from dcn_d2.engine import DCNPredictor, load_config
from dcn_d2.export import export
from dcn_d2.export.formats import SUFFIXES
from dcn_d2.export.request import PACKAGES

from ..engine.tiny import tiny_config
from .models import build_lively

SIZES = [(96, 128), (128, 96), (80, 80)]  # (height, width): landscape, portrait, square


class Detector:
    """A Mask R-CNN with two classes, and a COCO file that holds most of what it finds in a few images.

    So its AP is neither 0 nor 100, and depends on every detection.

    Attributes:
        config_file, weights: of the model.
        images: the files.
        annotations: in COCO's format; the config's own data set.
        predictor: the model in torch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_file, self.weights, self.annotations = (
            folder / name for name in ("config.yaml", "model.pth", "annotations.json")
        )
        cfg = self._config()
        torch.save({"model": build_lively(cfg, seed=1).state_dict()}, self.weights)
        self.images = [self._image(number, *size) for number, size in enumerate(SIZES)]
        self.annotations.write_text("{}")
        self.config_file.write_text(cfg.dump())
        self.predictor = DCNPredictor(load_config(str(self.config_file)))
        self.annotations.write_text(json.dumps(self._annotate()))

    def _config(self) -> CfgNode:
        return tiny_config(
            self.folder / "unused",
            *("MODEL.WEIGHTS", str(self.weights)),
            *("MODEL.MASK_ON", True),
            *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
            *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14),
            *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
            *("MODEL.ROI_HEADS.NUM_CLASSES", 2),
            *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3),
            *("MODEL.RPN.NMS_THRESH", 0.5),
            *("INPUT.MIN_SIZE_TEST", 96),
            *("INPUT.MAX_SIZE_TEST", 128),
            *("DATASETS.TRAIN", ()),
            *("DATASETS.TEST", ("own",)),
            *("DATASETS.OWN", [["own", str(self.annotations), str(self.folder / "images")]]),
            *("DATASETS.CLASS_NAMES", ["cell", "crack"]),
        )

    def _image(self, number: int, height: int, width: int) -> Path:
        generator = np.random.default_rng(number)
        small = generator.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        path = self.folder / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
        return path

    def _annotate(self) -> dict[str, Any]:
        """Every detection but each third is an object, and a few pixels away from where it was found."""
        images, annotations = [], []
        for number, (path, (height, width)) in enumerate(zip(self.images, SIZES), 1):
            images.append({"id": number, "file_name": path.name, "height": height, "width": width})
            found = self.predictor(str(path))["instances"]
            assert len(found) > 10
            for index in (index for index in range(len(found)) if index % 3):
                shift = index % 4
                mask = np.roll(found.pred_masks[index].numpy(), shift, axis=1)
                coded = pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                x0, y0, x1, y1 = found.pred_boxes.tensor[index].tolist()
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": int(found.pred_classes[index]) + 1,
                        "bbox": [x0 + shift, y0, x1 - x0, y1 - y0],
                        "area": (x1 - x0) * (y1 - y0),
                        "iscrowd": 0,
                        "segmentation": {"size": list(mask.shape), "counts": coded["counts"].decode()},
                    }
                )
        categories = [{"id": 1, "name": "cell"}, {"id": 2, "name": "crack"}]
        return {"images": images, "annotations": annotations, "categories": categories}

    def export(self, format: str = "torchscript", **options: Any) -> Path:
        """Exports it, once for the same options; skips the test if the runtime is not installed."""
        for package in PACKAGES.get(format, ()):
            if find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
        name = "_".join(["model", *(f"{key}={value}" for key, value in sorted(options.items()))])
        path = self.folder / f"{name}{SUFFIXES[format]}"
        if not path.exists():
            names = tuple(self.predictor.class_names)
            export(
                load_config(str(self.config_file)),
                path,
                model=self.predictor.model,
                class_names=names,
                check=False,  # test_export.py tests it
                **options,
            )
        return path
