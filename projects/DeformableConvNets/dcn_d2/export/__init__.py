# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Trained models for other runtimes: ONNX, OpenVINO, torch.export and TorchScript.

- `load` opens an exported file as a predictor, which is called with an image.
- `ExportedModel` is what Detectron2's evaluation calls.
- `Description` is what a file says about itself.

Importing it imports no runtime; each is imported when a file of its format is opened or written.
"""

from .description import Description
from .model import ExportedModel, open_model
from .predictor import ExportedPredictor, load

__all__ = ["Description", "ExportedModel", "ExportedPredictor", "load", "open_model"]
