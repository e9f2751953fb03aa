# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Pictures of a few test images at each evaluation in training: ground truth, detections, and sampling locations.

They go into Detectron2's event storage, and from there to TensorBoard and the writers of TRACKING.WRITERS.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from detectron2.utils.visualizer import Visualizer
from torch import nn

from ..config import with_dcn_keys
from ..data.images import read_image
from ..data.mapper import DCNDatasetMapper
from ..outputs import plain_label, unique_stems
from ..visualizer import SamplingAnnotator, SamplingRecord, record_sampling
from .errors import one_line
from .random_numbers import random_numbers_kept

logger = logging.getLogger(__name__)

PANEL = 512  # pixels of the longer side of a panel
LOWEST_SCORE = 0.5  # of a detection that is drawn


def put_pictures(cfg: CfgNode, model: nn.Module) -> None:
    """Draws what `model` finds in TEST.PICTURES images of each test set, if this is an evaluation in training.

    Only the main process draws. The model, random numbers and results stay as they are. An error is a warning.

    Args:
        cfg: of the run.
        model: the one that was evaluated.
    """
    count = with_dcn_keys(cfg).TEST.PICTURES
    if not count or not comm.is_main_process() or not has_event_storage():
        return
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    for name in cfg.DATASETS.TEST:
        try:
            with random_numbers_kept(), _evaluated(model), torch.no_grad():
                _draw_data_set(cfg, model, name, count)
        except Exception as error:  # a picture is not worth a training
            logger.warning(f"TEST.PICTURES: no pictures of data set {name}: {one_line(error)}")


def _draw_data_set(cfg: CfgNode, model: nn.Module, name: str, count: int) -> None:
    mapper = DCNDatasetMapper(cfg, is_train=False)
    samples = _choose(name, count)
    storage = get_event_storage()
    metadata = _plain_names(MetadataCatalog.get(name).get("thing_classes", []))
    for sample, stem in zip(samples, unique_stems(sample["file_name"] for sample in samples)):
        with record_sampling(model) as record:
            output = model([mapper(sample)])[0]
        if "instances" not in output:
            raise ValueError("the model gives no instances to draw")
        found = output["instances"].to("cpu")
        found = found[found.scores >= LOWEST_SCORE]
        image = read_image(sample["file_name"], "RGB")
        panels = [_draw_truth(image, sample, metadata)] if "annotations" in sample else []
        panels.append(_draw_found(image, found, metadata))
        storage.put_image(f"{name}/detections/{stem}", _beside(panels))
        if panels := _draw_sampling(image, record, found):
            storage.put_image(f"{name}/sampling/{stem}", _beside(panels))


@functools.lru_cache(maxsize=8)
def _choose(name: str, count: int) -> list[dict[str, Any]]:
    """Gives `count` images at equal distances in a data set, among those with annotations if there are enough."""
    samples = DatasetCatalog.get(name)
    samples = [samples[index] for index in range(len(samples))]
    annotated = [sample for sample in samples if sample.get("annotations")]
    samples = annotated if len(annotated) >= count else samples
    return [samples[index * len(samples) // count] for index in range(min(count, len(samples)))]


def _plain_names(names: list[str]) -> Any:
    """Metadata for Detectron2's drawing, with names in which a $ does not begin a formula."""
    return Metadata().set(thing_classes=[plain_label(name) for name in names]) if names else Metadata()


def _enlarge(image: np.ndarray) -> np.ndarray:
    height, width = (max(1, round(side * PANEL / max(image.shape[:2]))) for side in image.shape[:2])
    return cv2.resize(
        image, (width, height), interpolation=cv2.INTER_AREA if max(image.shape) > PANEL else cv2.INTER_CUBIC
    )


def _draw_truth(image: np.ndarray, sample: dict[str, Any], metadata: Any) -> np.ndarray:
    pen = Visualizer(image, metadata, scale=PANEL / max(image.shape[:2]))
    return _enlarge(pen.draw_dataset_dict(sample).get_image())


def _draw_found(image: np.ndarray, found: Instances, metadata: Any) -> np.ndarray:
    pen = Visualizer(image, metadata, scale=PANEL / max(image.shape[:2]))
    return _enlarge(pen.draw_instance_predictions(found).get_image())


def _draw_sampling(image: np.ndarray, record: SamplingRecord, found: Instances) -> list[np.ndarray]:
    """Gives one panel for each stage with deformable layers: what leads to the centre of the best detection there.

    Without a detection it is the image's centre.
    """
    point = np.array(image.shape[:2]) / 2
    if len(found):
        point = found.pred_boxes.get_centers()[int(found.scores.argmax())].flip(0).numpy()
    large = _enlarge(image)
    y, x = point * (np.array(large.shape[:2]) / image.shape[:2]) - 0.5
    # The part of a layer's name that names its stage; layers outside of a ResNet's stages go by their own names.
    stages = dict.fromkeys(
        match[1] if (match := re.search(r"(?:^|\.)(res\d)\.", layer.name)) else layer.name for layer in record.layers
    )
    return [SamplingAnnotator()(large, record, (float(y), float(x)), stage) for stage in stages]


def _beside(panels: list[np.ndarray]) -> np.ndarray:
    """Puts panels of one size side by side; gives (3, height, width), as the event storage takes it."""
    height, width = panels[0].shape[:2]
    same = [panel if panel.shape[:2] == (height, width) else cv2.resize(panel, (width, height)) for panel in panels]
    return np.ascontiguousarray(np.concatenate(same, axis=1).transpose(2, 0, 1))


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Switches to evaluation and back, after an error too; Detectron2's `inference_context` then stays there."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
