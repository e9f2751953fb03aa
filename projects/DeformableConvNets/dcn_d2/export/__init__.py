# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Trained models for other runtimes: ONNX, OpenVINO, torch.export and TorchScript."""

from .build import Exported, export
from .check import DifferentResultError

__all__ = ["DifferentResultError", "Exported", "export"]
