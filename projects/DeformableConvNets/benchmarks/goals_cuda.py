# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The goals of the CUDA operators as data, for one H100 or better.

A price is the time over that of cuDNN's plain convolution in the same dtype, in its faster memory format.
"""

from __future__ import annotations

from typing import Any

from benchmarks.goal import Goal
from benchmarks.rows import BUFFERS, PASSES

BATCHES = (2, 16)
LAYERS: dict[str, Any] = {"stride": 1, "groups": 1, "deform_groups": 1, "mask": True, "batch": BATCHES}
OURS = "dcn_d2 NHWC"


def _mean(what: str, quotient: tuple[str, str], where: dict[str, Any], **bound: Any) -> Goal:
    return Goal(f"CUDA, {what}", "deform_conv2d", quotient, where=LAYERS | where, mean=True, **bound)


def _convolution() -> list[Goal]:
    """Goals of geometric means over c3 to c5 at both batch sizes, for each state of the caches."""
    found = []
    for buffers in BUFFERS:
        forward, both = ({"pass": direction, "buffers": buffers} for direction in PASSES)
        for dtype, bound in (("bfloat16", 1.4), ("float16", 1.4), ("tf32", 1.3), ("float32", 1.0)):
            what = f"{dtype} forward price, channels_last, {buffers}"
            found.append(_mean(what, (OURS, "conv"), forward | {"dtype": dtype}, at_most=bound))
        half = {"dtype": "bfloat16"}
        what = f"bfloat16 forward+backward price, channels_last, {buffers}"
        found.append(_mean(what, (OURS, "conv"), both | half, at_most=2.0))
        for where, part, bound, peer in (
            (forward, "forward", 10.0, "autocast torchvision"),
            (both, "forward+backward", 10.0, "autocast torchvision"),
            (forward, "forward", 6.0, "deformops"),
            (both, "forward+backward", 5.0, "deformops"),
        ):
            what = f"bfloat16 {part} over {peer}, {buffers}"
            found.append(_mean(what, (peer, "dcn_d2"), where | half, at_least=bound))
        what = f"float32 forward over torchvision, {buffers}"
        found.append(_mean(what, ("torchvision", "dcn_d2"), forward | {"dtype": "float32"}, at_least=4.0))
        what = f"bfloat16 forward+backward: the deterministic mode over the default, {buffers}"
        found.append(_mean(what, ("deterministic NHWC", OURS), both | half, at_most=1.5))
    for direction in PASSES:
        what = f"CUDA, bfloat16 {direction}, NCHW: extra memory over that of channels_last copies"
        where = LAYERS | {"pass": direction, "dtype": "bfloat16"}
        found.append(Goal(what, "deform_conv2d_memory", ("dcn_d2 NCHW", "copies"), at_most=1.0, where=where))
    return found


def _roi_pooling() -> list[Goal]:
    """Goals of the modulated operator, which does the most work. `roi_align` has no deformable form."""
    found = []
    sizes = {"rois": 512, "channels": 256, "bins": 7, "sampling": 2}
    for dtype in ("float32", "float16"):
        where = sizes | {"dtype": dtype}
        for direction in PASSES:
            what = f"CUDA, {dtype} deform_roi_pool {direction} over roi_align, each"
            selected = where | {"pass": direction}
            found.append(Goal(what, "deform_roi_pool", ("roi_align", "modulated"), at_least=2.0, where=selected))
        what = f"CUDA, {dtype} deform_roi_pool forward+backward: the deterministic mode over the default"
        quotient = ("deterministic NHWC", "modulated NHWC")
        selected = where | {"pass": "forward+backward"}
        found.append(Goal(what, "deform_roi_pool", quotient, at_most=1.5, where=selected, mean=True))
    return found


def _detectors() -> list[Goal]:
    return [
        Goal(f"CUDA, Faster R-CNN {part}, mdconv c3-c5 over plain", "detector", ("dcn_d2", "plain"), bound, where=where)
        for part, bound in (("inference", 1.05), ("training", 1.10))
        for where in [{"pass": part, "dtype": "float16", "height": 800, "width": 1216}]
    ]


GOALS = [*_convolution(), *_roi_pooling(), *_detectors()]
