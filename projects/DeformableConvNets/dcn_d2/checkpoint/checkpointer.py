# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Detectron2's checkpointer, which also recognises ImageNet weights with torchvision's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from .torchvision import convert_torchvision_resnet, is_torchvision_resnet


class DCNCheckpointer(DetectionCheckpointer):
    """A `DetectionCheckpointer` that recognises by content, and converts, a torchvision ResNet or ResNeXt.

    Such a file must cover the ResNet of the model, offset branches aside, and fit it in every shape; what does not is
    an error that lists it. All other files are read as Detectron2 reads them.
    """

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = super()._load_file(filename)
        weights = checkpoint["model"]
        if isinstance(weights.get("state_dict"), Mapping):  # as MMDetection wraps its files
            weights = weights["state_dict"]
        if is_torchvision_resnet(weights):
            return {"model": self._fit_resnet(filename, convert_torchvision_resnet(weights))}
        if any(name.startswith("backbone.layer1.") for name in weights):
            raise ValueError(
                f"{filename} holds a detector of MMDetection; this version of dcn_d2 reads MMDetection's and "
                "torchvision's ImageNet weights, but not MMDetection's detectors"
            )
        return checkpoint

    def _fit_resnet(self, filename: str, weights: dict[str, Any]) -> dict[str, Any]:
        """Puts the model's prefix before the names, and checks names and shapes."""
        model = self.model.state_dict()
        stems = [name for name in model if name.endswith("stem.conv1.weight")]
        if len(stems) != 1:
            raise ValueError(f"{filename} holds a ResNet, but the model has {len(stems)} ResNets and not one")
        prefix = stems[0].removesuffix("stem.conv1.weight")
        weights = {prefix + name: value for name, value in weights.items()}
        problems = []
        for name, value in model.items():
            own = name.startswith((f"{prefix}stem.", f"{prefix}res"))
            if not own or ".conv2_offset." in name or name.endswith(".num_batches_tracked"):
                continue
            if name not in weights:
                problems.append(f"{name} is missing")
            elif weights[name].shape != value.shape:
                problems.append(f"{name} is {list(weights[name].shape)}, the model's is {list(value.shape)}")
        if problems:
            raise ValueError(f"{filename} does not fit the model's ResNet: " + "; ".join(problems))
        return weights
