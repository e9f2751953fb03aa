# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""ONNX files: what writes them, what runs them, and what TensorRT would refuse in them."""

from __future__ import annotations

from .session import Session
from .tensorrt import find_tensorrt_problems
from .writer import write

__all__ = ["Session", "find_tensorrt_problems", "write"]
