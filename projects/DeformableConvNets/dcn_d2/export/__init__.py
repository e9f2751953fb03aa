# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Trained models for other runtimes: ONNX, OpenVINO, torch.export and TorchScript.

- `export` writes a model into a file, and compares it with the model.
- `load` opens such a file as a predictor, which is called with an image.
- `ExportedModel` is what Detectron2's evaluation calls.
- `Description` is what a file says about itself.

Importing it imports no runtime; each is imported when a file of its format is written or opened.
"""

from .build import Exported, export
from .check import DifferentResultError
from .description import Description
from .model import ExportedModel, open_model
from .predictor import ExportedPredictor, load

__all__ = [
    "Description",
    "DifferentResultError",
    "Exported",
    "ExportedModel",
    "ExportedPredictor",
    "export",
    "load",
    "open_model",
]
