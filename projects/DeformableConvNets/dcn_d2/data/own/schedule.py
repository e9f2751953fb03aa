# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A number of epochs as iterations, with the rest of the schedule in proportion."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from detectron2.config import CfgNode

from .categories import OwnFile

MOST_CHECKPOINTS = 12  # of a run: as many as the rows of the zoo write


def count_training_images(files: Sequence[OwnFile], cfg: CfgNode) -> int:
    """How many images the training takes: those without objects are left out by Detectron2's default."""
    if not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        return sum(len(file.content["images"]) for file in files)
    taken = 0
    for file in files:
        with_objects = {entry["image_id"] for entry in file.annotations if not entry.get("iscrowd", 0)}
        taken += sum(image["id"] in with_objects for image in file.content["images"])
    return taken


def set_epochs(cfg: CfgNode, epochs: float, images: int, given: Collection[str] = ()) -> str:
    """Sets the schedule to a number of epochs, and says so in a line.

    SOLVER.STEPS keep their places in proportion to SOLVER.MAX_ITER. The warm-up takes at most a tenth of the
    iterations. A checkpoint is written, and an evaluation made where TEST.EVAL_PERIOD asks for any, each epoch, but at
    most about 12 times.

    Args:
        cfg: the config, with the schedule of its row; it is changed.
        epochs: how often each image is seen.
        images: of the training.
        given: keys that the user has set, which stay.
    """
    solver = cfg.SOLVER
    old, new = solver.MAX_ITER, max(1, math.ceil(epochs * images / solver.IMS_PER_BATCH))
    steps = sorted({round(step * new / old) for step in solver.STEPS})
    period = max(math.ceil(images / solver.IMS_PER_BATCH), math.ceil(new / MOST_CHECKPOINTS))
    values = {
        "SOLVER.MAX_ITER": new,
        "SOLVER.STEPS": tuple(step for step in steps if 0 < step < new),
        "SOLVER.WARMUP_ITERS": min(solver.WARMUP_ITERS, new // 10),
        "SOLVER.CHECKPOINT_PERIOD": min(period, new),
    }
    if cfg.TEST.EVAL_PERIOD:
        values["TEST.EVAL_PERIOD"] = min(period, new)
    values = {key: value for key, value in values.items() if key not in given}
    cfg.merge_from_list([part for pair in values.items() for part in pair])
    changes = ", ".join(f"{key} {value}" for key, value in values.items())
    return f"{epochs:g} epochs of {images} images, {solver.IMS_PER_BATCH} at a time: {changes}"


def describe_epochs(cfg: CfgNode, images: int) -> str:
    """Says how many epochs SOLVER.MAX_ITER is."""
    epochs = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / images
    shown = f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.2g}"
    return (
        f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}: each of the {images} images is seen {shown} times. "
        "--epochs N chooses another number"
    )
