# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Operators of dcn_d2 as operators of ONNX: those that `portable_operators` does not replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...ops import batched_nms as _batched_nms  # noqa: F401  defines the operator
from ..proposals import NO_BOX

_MANY = 2**31 - 1


def translations() -> dict[Any, Callable[..., Any]]:
    """Gives the functions with which `torch.onnx.export` translates operators, its `custom_translation_table`."""
    from onnxscript import opset19

    op: Any = opset19  # its annotations refuse its own results

    def batched_nms(boxes: Any, scores: Any, iou_threshold: float) -> Any:
        """NonMaxSuppression lists the boxes that are kept; ScatterND marks them. TensorRT scatters no truth values."""
        number = boxes.shape[1] if boxes.shape is not None and isinstance(boxes.shape[1], int) else _MANY
        kept = op.NonMaxSuppression(
            boxes,
            op.Unsqueeze(scores, op.Constant(value_ints=[1])),  # each row is a batch with one class
            op.Constant(value_ints=[number]),
            op.Constant(value_floats=[float(iou_threshold)]),
            op.Constant(value_floats=[NO_BOX]),
        )
        places = op.Gather(kept, op.Constant(value_ints=[0, 2]), axis=1)  # of (row, class, box)
        zeros = op.Expand(op.Constant(value_ints=[0]), op.Shape(scores))
        ones = op.Expand(op.Constant(value_ints=[1]), op.Shape(places, end=1))
        return op.Cast(op.ScatterND(zeros, places, ones), to=9)

    return {torch.ops.dcn_d2.batched_nms.default: batched_nms}
