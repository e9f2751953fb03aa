# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Runs a row in MMDetection and in Detectron2 with the same weights, and compares. Needs mmdet."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from dcn_d2.checkpoint import convert_mmdet_state_dict
from dcn_d2.engine import DCNPredictor

from . import oracle, ours
from .compare import compare
from .rows import OTHER_POOLERS, SMALL_SCALE

PHOTOGRAPHS = ("coffee", "astronaut", "chelsea", "rocket")
TERMS = {"loss_rpn_cls": "loss_rpn_cls", "loss_rpn_bbox": "loss_rpn_loc"}  # MMDetection's name -> Detectron2's
TERMS |= {"loss_cls": "loss_cls", "loss_bbox": "loss_box_reg", "loss_mask": "loss_mask"}


def pooled_as(pooling: str) -> contextlib.AbstractContextManager[None]:
    """What MMDetection needs to run dpool and mdpool rows on CPU."""
    return oracle.pooled_by(pooling) if pooling else contextlib.nullcontext()


def pooling_of(row: str) -> str:
    """The pooling with which a row was trained, "" where it is RoIAlign."""
    return "original" if row.endswith("pool") else ""


def publish(model: torch.nn.Module, folder: Path, row: str, *, old_offset_names: bool = False) -> Path:
    """Saves a model of MMDetection under a name with the hash of the file in it, as its model zoo does."""
    path = folder / f"{row}.pth"
    oracle.save(model, path, old_offset_names=old_offset_names)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(folder / f"{row}_20200130-{digest[:8]}.pth")


def compare_detections(
    row: str,
    photograph: str,
    scale: tuple[int, int],
    folder: Path,
    *,
    old_offset_names: bool = False,
    pooling: str | None = None,
) -> dict[str, Any]:
    """Runs both sides of a row over a photograph.

    Args:
        row: the row of the zoo.
        photograph: a name of scikit-image's.
        scale: shortest and longest side of what the networks see.
        folder: for the weights; they stay there.
        old_offset_names: saves the offset branches under their name of January 2020.
        pooling: "original" or "aligned", instead of the row's own.

    Returns:
        The differences as `compare.compare` names them, and what was compared.
    """
    image = oracle.photograph(photograph)
    model = oracle.build(oracle.load_config(row))
    pooling = pooling_of(row) if pooling is None else pooling
    with pooled_as(pooling):
        data = oracle.prepare(image, scale)
        oracle.calibrate(model, data, oracle.seed_of(row))
        theirs = oracle.predict(model, data)
    weights = publish(model, folder, row, old_offset_names=old_offset_names)
    del model
    cfg = ours.config(row, f"mmdet://{weights}", scale)
    if pooling == "aligned":
        cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = OTHER_POOLERS[row]
    found = ours.predict(DCNPredictor(cfg), image)
    height, width = theirs["input"].shape[1:]
    return {
        "row": row,
        "pooling": pooling,
        "photograph": photograph,
        "input_size": f"{height}x{width}",
        **compare(found, theirs),
    }


def training_case(seed: int) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Two photographs (BGR, 256 x 320 and 224 x 320) with boxes, classes and masks of objects drawn at random."""
    random = np.random.RandomState(seed)
    images, boxes, classes, masks = [], [], [], []
    for name, height in (("coffee", 256), ("astronaut", 224)):
        images.append(cv2.resize(oracle.photograph(name), (320, height)))
        size = np.array([40.0, 70.0, 120.0, 180.0])[:, None] * random.uniform(0.8, 1.2, (4, 2))
        corner = random.uniform(0, 1, (4, 2)) * (np.array([320, height]) - size)
        boxes.append(np.concatenate([corner, corner + size], 1).astype(np.float32))
        classes.append(random.randint(0, 80, 4))
        y, x = np.mgrid[:height, :320]
        centre, radius = (corner + size / 2)[:, :, None, None], size[:, :, None, None] / 2
        masks.append(((x - centre[:, 0]) / radius[:, 0]) ** 2 + ((y - centre[:, 1]) / radius[:, 1]) ** 2 < 1)
    return images, boxes, classes, masks


def name_of_term(term: str) -> str:
    """Detectron2's name of a loss that MMDetection names `loss_cls` or, in a stage of a cascade, `s0.loss_cls`."""
    stage, dot, term = term.rpartition(".")
    return TERMS[term] + (f"_stage{stage[1:]}" if dot else "")


def compare_losses(row: str) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """Runs a training step of both sides of a row with the same weights, images and sampling.

    Returns:
        (ours, theirs) for every term of the loss by its name in Detectron2, and the relative difference of the gradient
        of every parameter.
    """
    images, boxes, classes, masks = training_case(oracle.seed_of(row))
    config = oracle.load_config(row)
    oracle.sample_all_rois(config)
    model = oracle.build(config)
    with pooled_as(pooling_of(row)):
        oracle.calibrate(model, oracle.prepare(images[0], SMALL_SCALE), oracle.seed_of(row))
        theirs, their_gradients = oracle.losses(model, images, boxes, classes, masks)

    cfg = ours.config(row)
    ours.sample_all_rois(cfg)
    mine = ours.build(cfg)
    ours.fill(mine, model.state_dict())
    found, gradients = ours.losses(mine, [image[:, :, ::-1] for image in images], boxes, classes, masks)
    expected = {name_of_term(name): value for name, value in theirs.items()}
    assert found.keys() == expected.keys(), f"ours: {sorted(found)}; MMDetection's: {sorted(expected)}"
    # Gradients are renamed by the conversion of weights. It needs a whole state dict, and does not copy the tensors.
    whole = {name: their_gradients.get(name, value) for name, value in model.state_dict().items()}
    of_gradients = {id(value) for value in their_gradients.values()}
    converted = {name: value for name, value in convert_mmdet_state_dict(whole).items() if id(value) in of_gradients}
    assert gradients.keys() == converted.keys(), f"only on one side: {sorted(gradients.keys() ^ converted.keys())}"
    differences = {
        name: float((gradient - converted[name]).norm() / converted[name].norm().clamp(min=1e-12))
        for name, gradient in gradients.items()
    }
    return {name: (found[name], expected[name]) for name in expected}, differences
