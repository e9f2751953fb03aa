# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Exported files without a file: torch runs the module behind the interface of a session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode

from dcn_d2 import __version__
from dcn_d2.export.description import Description, TensorInfo
from dcn_d2.export.detector import ExportableDetector
from dcn_d2.export.shapes import input_tensors


def describe(cfg: CfgNode, module: ExportableDetector, **changes: Any) -> Description:
    """Describes a detector of a config; `changes` are fields."""
    size, batch = changes.get("size"), changes.get("batch")
    model_names = tuple(changes.pop("class_names", ()))
    return Description(
        **{
            "part": "detector",
            "row": "row",
            "class_names": model_names,
            "weights": "",
            "weights_digest": "0",
            "channel_order": cfg.INPUT.FORMAT,
            "pixel_mean": tuple(cfg.MODEL.PIXEL_MEAN),
            "pixel_std": tuple(cfg.MODEL.PIXEL_STD),
            "size": None,
            "size_divisibility": 32,
            "batch": None,
            "dtype": "float32",
            "masks": module.masks,
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "min_size_test": cfg.INPUT.MIN_SIZE_TEST,
            "max_size_test": cfg.INPUT.MAX_SIZE_TEST,
            "inputs": input_tensors(len(cfg.MODEL.PIXEL_MEAN), size, batch, module.masks == "pasted"),
            "outputs": tuple(TensorInfo(name, "", ()) for name in module.names),
            "config": cfg.dump(),
            "dcn_d2_version": __version__,
        }
        | changes
    )


class TorchSession:
    """A `Session` that runs a module, and refuses shapes that a file with its description would refuse."""

    def __init__(self, module: ExportableDetector, description: Description) -> None:
        self.module, self.description = module, description
        self.shapes: list[tuple[int, ...]] = []

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert list(inputs) == [each.name for each in self.description.inputs]
        for each in self.description.inputs:
            array = inputs[each.name]
            assert str(array.dtype) == each.dtype
            assert all(wanted in (found, str(wanted)) for wanted, found in zip(each.shape, array.shape)), array.shape
        images = inputs["images"]
        assert not any(side % self.description.size_divisibility for side in images.shape[2:])
        self.shapes.append(images.shape)
        with torch.no_grad():
            outputs = self.module(*(torch.from_numpy(array) for array in inputs.values()))
        return {name: value.numpy() for name, value in zip(self.module.names, outputs)}
