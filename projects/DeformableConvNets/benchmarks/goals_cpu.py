# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The goals of the CPU operators as data.

A price is a time over that of the plain contestant of the same shape, number of threads and memory format; a speed is
a peer's time over ours.
"""

from __future__ import annotations

from typing import Any

from benchmarks.goal import Goal
from benchmarks.rows import PASSES

PLAIN: dict[str, Any] = {"batch": 1, "stride": 1, "groups": 1, "deform_groups": 1, "mask": True}
ONE = {"threads": 1, "dtype": "float32"}
FORMATS = ("NHWC", "NCHW")


def _each_and_mean(
    what: str, quotient: tuple[str, str], where: dict[str, Any], benchmark: str = "deform_conv2d", **bounds: Any
) -> list[Goal]:
    """Two goals from bounds that are pairs: for each row, and for the geometric mean."""
    each = {name: pair[0] for name, pair in bounds.items()}
    mean = {name: pair[1] for name, pair in bounds.items()}
    return [
        Goal(f"{what}, each", benchmark, quotient, where=where, **each),
        Goal(f"{what}, geometric mean", benchmark, quotient, where=where, mean=True, **mean),
    ]


def _convolution() -> list[Goal]:
    forward = ONE | PLAIN | {"pass": "forward"}
    both = ONE | PLAIN | {"pass": "forward+backward"}
    grouped = forward | {"groups": 32}
    last, first = ("dcn_d2 NHWC", "conv NHWC"), ("dcn_d2 NCHW", "conv NCHW")
    over_torchvision = ("torchvision", "dcn_d2")
    found = [
        *_each_and_mean("forward price, channels_last, 1 thread", last, forward, at_most=(1.15, 1.10)),
        *_each_and_mean("forward price, NCHW, 1 thread", first, forward, at_most=(1.20, 1.12)),
        *_each_and_mean("forward+backward price, channels_last, 1 thread", last, both, at_most=(1.30, 1.20)),
        *_each_and_mean("forward over torchvision, 1 thread", over_torchvision, forward, at_least=(3.2, 6.0)),
        *_each_and_mean("forward+backward over torchvision, 1 thread", over_torchvision, both, at_least=(7.0, 16.0)),
    ]
    for dtype in ("bfloat16", "float16"):
        where = forward | {"dtype": dtype}
        found.append(Goal(f"{dtype} forward price, 1 thread", "deform_conv2d", ("dcn_d2", "conv"), 1.0, where=where))
    for threads, words in ((1, "1 thread"), ("all", "all threads")):
        where = forward | {"threads": threads}
        what = f"forward over ONNX Runtime, {words}"
        found += _each_and_mean(what, ("onnxruntime", "dcn_d2"), where, at_least=(1.4, 1.8))
    what = "forward over OpenVINO, 1 thread"
    found += _each_and_mean(what, ("openvino", "dcn_d2"), forward, at_least=(1.2, 1.3))
    for layout, quotient in zip(FORMATS, (last, first)):
        what = f"groups=32: forward price, {layout}, 1 thread"
        found.append(Goal(what, "deform_conv2d", quotient, at_most=2.5, where=grouped))
    what = "groups=32: forward over torchvision, 1 thread"
    found.append(Goal(what, "deform_conv2d", over_torchvision, at_least=20.0, where=grouped))
    for direction in PASSES:
        for layout, quotient in zip(FORMATS, (last, first)):
            what = f"{direction}, {layout}: gain from all threads over the plain convolution's"
            where = forward | {"pass": direction}
            found.append(Goal(what, "deform_conv2d", quotient, at_least=0.95, where=where, scaling=True))
    for direction, bound in zip(PASSES, (1.0, 1.2)):
        for layout, quotient in zip(FORMATS, (last, first)):
            what = f"{direction}, {layout}: extra memory over the plain convolution's"
            where = PLAIN | {"pass": direction}
            found.append(Goal(what, "deform_conv2d_memory", quotient, at_most=bound, where=where))
    return found


def _roi_pooling() -> list[Goal]:
    """Goals of the modulated operator, which does the most work. `roi_align` has no deformable form."""
    found = []
    sizes = ONE | {"rois": 512, "channels": 256, "bins": 7}
    for sampling in (2, 4):
        for layout, bound in zip(FORMATS, (12.0, 8.0)):
            what = f"deform_roi_pool forward over roi_align, {layout}, sampling {sampling}, 1 thread"
            where = sizes | {"sampling": sampling, "pass": "forward"}
            quotient = ("roi_align", f"modulated {layout}")
            found += _each_and_mean(what, quotient, where, "deform_roi_pool", at_least=(bound, bound))
        what = f"deform_roi_pool forward+backward over roi_align, sampling {sampling}, 1 thread"
        where = sizes | {"sampling": sampling, "pass": "forward+backward"}
        found += _each_and_mean(what, ("roi_align", "modulated"), where, "deform_roi_pool", at_least=(8.0, 8.0))
    return found


def _detectors() -> list[Goal]:
    return [
        Goal(
            f"{words}, mdconv c3-c5 over plain, {layout}, 1 thread",
            "detector",
            (f"dcn_d2 {layout}", f"plain {layout}"),
            at_most=bound,
            where=ONE | {"pass": part, "height": 800, "width": 1216},
        )
        for part, words, bound in (("trunk", "R-50 trunk", 1.08), ("inference", "whole Faster R-CNN, inference", 1.06))
        for layout in FORMATS
    ]


def _prediction() -> list[Goal]:
    return [
        Goal(
            f"{images} {name} images in one call over one by one, all threads",
            "predict",
            ("one by one", "many"),
            at_least=1.15,
            where={"threads": "all", "dtype": "float32", "name": f"R-50-FPN, {name}", "images": images},
        )
        for name, images in (("small", 64), ("large", 64))
    ]


GOALS = [*_convolution(), *_roi_pooling(), *_detectors(), *_prediction()]
