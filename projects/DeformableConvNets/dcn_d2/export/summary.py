# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What export.py says about the file that it has written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .build import Exported
from .description import Description
from .formats import SUFFIXES
from .onnx.tensorrt import find_tensorrt_problems


def summarise(exported: Exported) -> list[str]:
    """Gives the lines: the files, what goes in and comes out, what that demands, and how it compares."""
    lines = [f"note: {note}" for note in exported.notes]
    lines += [f"wrote {file} ({size / 1e6:.1f} MB)" for file, size in exported.files.items()]
    for what, tensors in (("inputs", exported.description.inputs), ("outputs", exported.description.outputs)):
        lines += [f"{what}:", *(f"  {tensor}" for tensor in tensors)]
    lines += demands(exported.description)
    if exported.comparison is None:
        lines.append("not compared with the model: --no-check")
    else:
        lines.append(f"compared with the model: {exported.comparison}")
    if exported.path.suffix == SUFFIXES["onnx"]:
        lines += judge_by_tensorrt(exported.path)
    return lines


def judge_by_tensorrt(path: Path) -> Iterator[str]:
    """Says whether TensorRT's importer takes an ONNX file, by its rules: it is not run."""
    problems = find_tensorrt_problems(path)
    if not problems:
        yield "by the rules of its importer, TensorRT 10.1 takes the file (not run here)"
    for problem in problems:
        yield f"TensorRT 10.1 would refuse it: {problem}"


def demands(description: Description) -> Iterator[str]:
    """Says what whoever calls the file must do."""
    unit = description.size_divisibility
    if description.size is None:
        multiples = f": both are multiples of {unit}" if unit > 1 else ""
        yield f"height and width are free{multiples}; an image lies at the top left, and image_sizes has its own size"
    else:
        height, width = description.size
        yield f"all images lie at the top left of canvases of {height} x {width}, and image_sizes has their own size"
    if description.batch is None:
        yield "the batch is free"
    elif description.batch == 1:
        yield "one image at a time"
    else:
        yield f"the batch is always {description.batch}; fill it up with any image"
    yield (
        f"images hold values from 0 to 255, channels in the order {description.channel_order}; "
        "the graph subtracts the means"
        if description.channel_order in ("RGB", "BGR", "L")
        else f"images are in INPUT.FORMAT {description.channel_order}; the graph subtracts the means"
    )
    if description.part == "detector":
        yield "rows of outputs with class -1 are no detections; they come last"
