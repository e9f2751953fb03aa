# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The tensors that go into an exported graph and come out of it: names, shapes, examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .description import Description, TensorInfo

# What free sizes are called in shapes.
BATCH, HEIGHT, WIDTH = "batch", "height", "width"
# Free sizes that an exporter may assume: of the batch, and of height and width in units of the divisibility. They begin
# at one: torch.export makes files that refuse what is left out, and a strip of an image is one unit high.
LARGEST_BATCH, LARGEST_SIDE = 1024, 1024
# Backbones without an FPN have no divisibility. In pixels then, and so large that no map of theirs is one pixel high,
# which torch.export takes for a special case.
SMALLEST_PIXELS, LARGEST_PIXELS = 64, 32768


def input_tensors(
    channels: int, size: tuple[int, int] | None, batch: int | None, pasted: bool
) -> tuple[TensorInfo, ...]:
    """Describes the inputs of a graph.

    Args:
        channels: of the images.
        size: height and width of the images, None if they are free.
        batch: number of images, None if it is free.
        pasted: whether masks are pasted into an image, whose size is an input.
    """
    number = BATCH if batch is None else batch
    inputs = (
        TensorInfo("images", "float32", (number, channels, *(size or (HEIGHT, WIDTH)))),
        TensorInfo("image_sizes", "int64", (number, 2)),
    )
    return (*inputs, TensorInfo("output_size", "int64", (2,))) if pasted else inputs


def example_inputs(description: Description) -> tuple[Tensor, ...]:
    """Makes inputs of a graph, with which it can be traced: images of noise that do not fill their canvases."""
    unit = description.size_divisibility if description.size_divisibility > 1 else 32
    height, width = description.size or (4 * unit, 5 * unit)
    batch = description.batch or 2
    generator = torch.Generator().manual_seed(0)
    channels = description.inputs[0].shape[1]
    images = torch.rand(batch, int(channels), height, width, generator=generator) * 255
    inputs = [images, torch.tensor([[height - unit // 4, width - unit // 8]]).expand(batch, -1).contiguous()]
    if description.masks == "pasted":
        inputs.append(torch.tensor([height // 2 + 3, width // 2 + 5]))
    return tuple(inputs)


def dynamic_shapes(description: Description) -> tuple[dict[int, Any], ...]:
    """Says which sizes of the inputs are free, as `torch.export.export` and `torch.onnx.export` take it."""
    free: dict[int, Any] = {}
    if description.batch is None:
        free[0] = torch.export.Dim(BATCH, min=1, max=LARGEST_BATCH)
    images = dict(free)
    if description.size is None:
        for axis, name in ((2, HEIGHT), (3, WIDTH)):
            if description.size_divisibility > 1:
                units = torch.export.Dim(f"{name}_units", min=1, max=LARGEST_SIDE)
                images[axis] = description.size_divisibility * units
            else:
                images[axis] = torch.export.Dim(name, min=SMALLEST_PIXELS, max=LARGEST_PIXELS)
    return images, free, *([{}] if description.masks == "pasted" else [])


def round_up(length: int, unit: int) -> int:
    """Gives the smallest multiple of a unit that is not below a length; a unit of 0 or 1 changes nothing."""
    return -(-length // unit) * unit if unit > 1 else length
