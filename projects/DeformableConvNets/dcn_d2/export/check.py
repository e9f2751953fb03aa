# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Runs an exported file beside the model that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from .compare import TOLERANCES, Comparison
from .description import Description
from .formats import Session, open_session
from .samples import Batch, batches_of

# With fewer detections a comparison says little.
ENOUGH = 10
# So many are compared where the threshold is lowered to have more.
WANTED = 40


class DifferentResultError(ValueError):
    """An exported file whose results differ from the model's by more than rounding."""


def check_equal(
    file: Path,
    cfg: CfgNode,
    model: Any,
    module: nn.Module,
    description: Description,
    pixels: np.ndarray,
    write_again: Callable[[nn.Module], Path],
) -> Comparison:
    """Compares the results of a file with those of the model, for an image and a mirrored part of it.

    Where the model detects little in them, a second graph is written and compared, which has a lower score threshold
    and is the same otherwise.

    Args:
        file: the exported one.
        cfg: of the model.
        model: of Detectron2, in evaluation mode, in float32 on the CPU.
        module: that was exported.
        description: of the file.
        pixels: (h, w, c) of the image.
        write_again: writes `module` once more, and gives the file.

    Raises:
        DifferentResultError: they differ by more than rounding.
    """
    batches = batches_of(pixels, cfg, description)
    if description.part == "backbone":
        return _judge(_compare_features(open_session(file), model, batches), description)
    comparison = _judge(_compare_detections(open_session(file), model, batches), description)
    if comparison.expected >= ENOUGH:
        return comparison
    with score_threshold(model, 0.0):
        threshold = _threshold_for(WANTED, [found for batch in batches for found in detect_eagerly(model, *_of(batch))])
    with score_threshold(model, threshold), score_threshold(module, threshold):
        again = _compare_detections(open_session(write_again(module)), model, batches)
    again.threshold = threshold
    if not again.expected:
        raise DifferentResultError(
            "the model detects nothing in the image, so that its results could not be compared: choose another image "
            "(--image FILE)"
        )
    return _judge(again, description)


def _judge(comparison: Comparison, description: Description) -> Comparison:
    problems = comparison.problems(TOLERANCES[description.dtype])
    if problems:
        raise DifferentResultError(f"the file's results differ from the model's: {'; '.join(problems)}")
    return comparison


def _of(batch: Batch) -> tuple[Tensor, list[tuple[int, int]]]:
    return torch.as_tensor(batch.canvases), batch.sizes


def _compare_features(session: Session, model: Any, batches: Sequence[Batch]) -> Comparison:
    comparison = Comparison(runs=len(batches))
    for batch in batches:
        found = session.run(batch.inputs(session.description))
        with torch.no_grad():
            expected = model.backbone(normalise(model, *_of(batch)))
        comparison.add_features(expected, found)
    return comparison


def _compare_detections(session: Session, model: Any, batches: Sequence[Batch]) -> Comparison:
    description = session.description
    comparison = Comparison(runs=len(batches))
    for batch in batches:
        results = session.run(batch.inputs(description))
        for number, expected in enumerate(detect_eagerly(model, *_of(batch))):
            size = batch.originals[0] if description.masks == "pasted" else batch.sizes[number]
            found = instances_of(results, number, batch.sizes[number], size)
            if description.masks == "none" and expected.has("pred_masks"):
                expected.remove("pred_masks")
            expected, limit = detector_postprocess(expected, *size), _threshold(model)
            if len(expected) == description.detections_per_image:
                limit = max(limit, float(expected.scores.min()))
            comparison.add(expected, found, limit, TOLERANCES[description.dtype])
    return comparison


def instances_of(
    results: dict[str, np.ndarray], number: int, size: tuple[int, int], output_size: tuple[int, int]
) -> Instances:
    """Gives the detections of an image from the results of a graph, with masks as truth values.

    Args:
        results: of the graph.
        number: of the image in its batch.
        size: height and width of the image in its canvas.
        output_size: height and width of the image to which boxes and masks are scaled, if the graph has not done it.
    """
    there = results["classes"][number] >= 0
    values = {name: torch.as_tensor(result[number][there]) for name, result in results.items()}
    pasted = "masks" in values and values["masks"].dtype == torch.bool
    found = Instances(output_size if pasted else size)
    found.pred_boxes, found.scores, found.pred_classes = Boxes(values["boxes"]), values["scores"], values["classes"]
    if "masks" in values:
        found.pred_masks = values["masks"] if pasted else values["masks"][:, None]
    return found if pasted else detector_postprocess(found, *output_size)


@torch.no_grad()
def detect_eagerly(model: Any, canvases: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Instances]:
    """What Detectron2 detects in images at the top left of canvases, in pixels of the canvases, with masks in boxes."""
    batch = ImageList(normalise(model, canvases, sizes), list(sizes))
    features = model.backbone(batch.tensor)
    proposals, _ = model.proposal_generator(batch, features, None)
    return model.roi_heads(batch, features, proposals, None)[0]


def normalise(model: Any, canvases: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Normalises images, and pads them with zeros, as Detectron2's models do."""
    normalised = (canvases - model.pixel_mean) / model.pixel_std
    for image, (height, width) in zip(normalised, sizes):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return normalised


def _predictors(model: Any) -> list[Any]:
    found = model.roi_heads.box_predictor
    return list(found) if isinstance(found, nn.ModuleList) else [found]


def _threshold(model: Any) -> float:
    return float(_predictors(model)[-1].test_score_thresh)


@contextmanager
def score_threshold(model: Any, threshold: float) -> Iterator[None]:
    """Changes the lowest score of detections for a while, of a model or an `ExportableDetector`."""
    predictors = _predictors(model)
    before = [predictor.test_score_thresh for predictor in predictors]
    try:
        for predictor in predictors:
            predictor.test_score_thresh = threshold
        yield
    finally:
        for predictor, value in zip(predictors, before):
            predictor.test_score_thresh = value


def _threshold_for(number: int, detections: Sequence[Instances]) -> float:
    """A threshold in the widest gap between scores, with about `number` detections of an image above it."""
    scores = torch.cat([found.scores[: number + 1] for found in detections]).sort(descending=True).values
    if len(scores) < 2:
        return 0.0
    low = max(len(scores) // 2, 1)
    gaps = scores[low - 1 : -1] - scores[low:]
    place = low + int(gaps.argmax())
    return float(scores[place - 1] + scores[place]) / 2
