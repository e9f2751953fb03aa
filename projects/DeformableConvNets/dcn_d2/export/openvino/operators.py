# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Translations of the operators of dcn_d2 into those of OpenVINO."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..proposals import NO_BOX


def extensions() -> list[Any]:
    """Gives what `openvino.convert_model` needs to convert the operators of dcn_d2.

    Deformable convolution is not among them: its frontend for PyTorch knows `torchvision::deform_conv2d`.
    """
    from openvino.frontend.pytorch import ConversionExtension

    return [ConversionExtension("dcn_d2::batched_nms", _batched_nms)]


def _batched_nms(node: Any) -> Any:
    """Translates `dcn_d2.ops.batched_nms` into NonMaxSuppression and a scatter of what it keeps."""
    from openvino import opset14 as ops

    boxes, scores = node.get_input(0), node.get_input(1)
    kept = ops.non_max_suppression(
        boxes,
        ops.unsqueeze(scores, np.int64(1)),  # (B, 1, R): each row is an image with one class
        np.int64(np.iinfo(np.int32).max),  # as many boxes as there are
        _reaches(float(node.get_values_from_const_input(2))),
        np.float32(NO_BOX),
        box_encoding="corner",
        sort_result_descending=False,
    )
    # Rows of (row, class, box); where their number is fixed, the last ones are filled up with -1.
    chosen = ops.slice(kept.output(0), np.array([0]), kept.output(2), np.array([1]), np.array([0]))
    places = ops.gather(chosen, np.array([0, 2]), np.int64(1))
    number = ops.slice(ops.shape_of(places), np.array([0]), np.array([1]), np.array([1]))
    nothing = ops.broadcast(np.int32(0), ops.shape_of(scores))
    return ops.convert(ops.scatter_nd_update(nothing, places, ops.broadcast(np.int32(1), number)), "boolean").outputs()


def _reaches(threshold: float) -> np.float32:
    """Gives the smallest float32 above a threshold: OpenVINO suppresses boxes at its threshold, we only above it.

    Above 0 it is a normal number: processors take smaller ones for 0, and then boxes that do not overlap go too.
    """
    nearest = np.float32(threshold)
    above = nearest if float(nearest) > threshold else np.nextafter(nearest, np.float32(np.inf))
    return max(above, np.finfo(np.float32).tiny) if threshold >= 0 else above
