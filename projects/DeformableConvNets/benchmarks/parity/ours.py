# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Detectron2's side: a row of the zoo with weights saved by MMDetection, run on the same images. No mmdet here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from dcn_d2 import model_zoo
from dcn_d2.checkpoint import convert_mmdet_state_dict
from dcn_d2.engine import DCNPredictor

from .compare import Outputs
from .weights import evenly_spaced_indices


def config(row: str, weights: str = "", scale: tuple[int, int] = (800, 1333)) -> CfgNode:
    """Config of a row for CPU, with `weights` and a test scale (shortest and longest side)."""
    cfg = model_zoo.get_config(row)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = weights
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = scale
    return cfg


def fill(model: nn.Module, mmdet_state_dict: Mapping[str, Tensor]) -> None:
    """Gives a model weights in MMDetection's layout; every tensor of the model must be among them, and no other."""
    converted = convert_mmdet_state_dict(mmdet_state_dict)
    missing, unexpected = model.load_state_dict(converted, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    assert not missing and not unexpected, f"missing: {missing}; unexpected: {unexpected}"


def predict(predictor: DCNPredictor, image: np.ndarray) -> Outputs:
    """Runs a predictor over an image (BGR); the arrays are named as `compare.compare` wants them."""
    with _recorded(predictor.model) as found:
        predictions = predictor(image)
    return found | _detections(predictions)


def predict_resized(model: nn.Module, resized: np.ndarray, height: int, width: int) -> Outputs:
    """Runs a model over an image (RGB) that has been resized already, for detections at size (height, width)."""
    tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
    with _recorded(model) as found, torch.no_grad():
        (predictions,) = model([{"image": tensor, "height": height, "width": width}])
    return found | _detections(predictions)


def _detections(predictions: Mapping[str, Instances]) -> Outputs:
    instances = predictions["instances"]
    found = {
        "boxes": instances.pred_boxes.tensor.numpy(),
        "scores": instances.scores.numpy(),
        "labels": instances.pred_classes.numpy(),
    }
    if instances.has("pred_masks"):
        found["masks"] = instances.pred_masks.numpy()
    return found


class _recorded:  # noqa: N801  a context manager that reads like a function
    """Collects what the parts of a model give for one image, by forward hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.found: Outputs = {}

    def __enter__(self) -> Outputs:
        def backbone(module: nn.Module, inputs: Any, output: Mapping[str, Tensor]) -> None:
            self.found["input"] = inputs[0][0].numpy()
            self.found.update({name: value.detach().numpy() for name, value in output.items()})

        def proposals(module: nn.Module, inputs: Any, output: Any) -> None:
            self.found["proposals"] = output[0][0].proposal_boxes.tensor.numpy()

        self.hooks = [
            self.model.backbone.register_forward_hook(backbone),
            self.model.proposal_generator.register_forward_hook(proposals),
        ]
        return self.found

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def sample_all_rois(cfg: CfgNode) -> None:
    """Makes the RoI sampler of a config take all RoIs."""
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 10**6
    cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 1.0


def losses(
    model: nn.Module,
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    classes: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Training losses and gradients for images (RGB, not resized) and their objects; anchors are sampled evenly."""
    inputs = []
    for image, box, label, mask in zip(images, boxes, classes, masks):
        objects = Instances(image.shape[:2])
        objects.gt_boxes = Boxes(torch.from_numpy(box))
        objects.gt_classes = torch.from_numpy(label)
        objects.gt_masks = BitMasks(torch.from_numpy(mask))
        inputs.append({"image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), "instances": objects})

    def subsample(labels: Tensor, num: int, fraction: float, background: int) -> tuple[Tensor, Tensor]:
        positive = ((labels != -1) & (labels != background)).nonzero()[:, 0]
        negative = (labels == background).nonzero()[:, 0]
        positive = positive[evenly_spaced_indices(len(positive), int(num * fraction))]
        return positive, negative[evenly_spaced_indices(len(negative), num - len(positive))]

    model.train()
    rpn = importlib.import_module("detectron2.modeling.proposal_generator.rpn")
    with mock.patch.object(rpn, "subsample_labels", subsample), EventStorage():
        terms = model(inputs)
    model.zero_grad()
    sum(terms.values()).backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.eval()
    return {name: float(value.detach()) for name, value in terms.items()}, gradients


def build(cfg: CfgNode) -> nn.Module:
    """The model of a config, in evaluation mode, without weights."""
    return build_model(cfg).eval()
