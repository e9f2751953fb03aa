# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Records what deformable layers sample in a forward pass, and follows samples back through several layers."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..layers import (
    DeformConv,
    DeformConvPack,
    ModulatedDeformConv,
    ModulatedDeformConvPack,
    split_offset_and_mask,
)
from ..ops.sampling import deform_conv2d_locations

Size = tuple[int, int]


class LayerSamples(NamedTuple):
    """What one deformable layer sampled in one forward pass.

    ``locations`` is (N, deform_groups, taps, out_h, out_w, 2), (y, x) in pixels of the layer's input map, whose
    (height, width) is ``input_size``. ``modulation`` is (N, deform_groups, taps, out_h, out_w), 1 where the layer
    has none.
    """

    name: str
    locations: Tensor
    modulation: Tensor
    input_size: Size

    @property
    def output_size(self) -> Size:
        """(height, width) of the layer's output map."""
        return self.locations.shape[3], self.locations.shape[4]


@dataclass
class SamplingRecord:
    """The samples of a model's deformable layers, in the order in which they ran.

    ``image_sizes`` are the (height, width) of the network's images, one for each of the batch, ``padded_size`` is that
    of the batch they were padded into.
    """

    layers: list[LayerSamples] = field(default_factory=list)
    image_sizes: list[Size] = field(default_factory=list)
    padded_size: Size = (0, 0)

    @property
    def image_size(self) -> Size:
        """(height, width) of the network's first image; (0, 0) before a forward pass."""
        return self.image_sizes[0] if self.image_sizes else (0, 0)

    def find(self, name: str | None = None) -> int:
        """Gives the index of the last layer whose name contains ``name`` as whole parts (``res4``, ``res5.0``)."""
        matches = [i for i, layer in enumerate(self.layers) if name is None or f".{name}." in f".{layer.name}."]
        if not matches:
            names = ", ".join(layer.name for layer in self.layers) or "none"
            raise KeyError(f"no recorded deformable layer matches {name!r}; recorded: {names}")
        return matches[-1]


class TracedLayer(NamedTuple):
    """The locations that one layer contributes to a traced point.

    ``positions`` is (n, 2), (y, x) in pixels of the network's image, where a whole number is a pixel's centre.
    ``weights`` is (n,): the product of the modulations on the way from the point to the location.
    """

    name: str
    positions: np.ndarray
    weights: np.ndarray


@contextmanager
def record_sampling(model: nn.Module) -> Iterator[SamplingRecord]:
    """Records the deformable layers of ``model`` while the block runs; a later forward pass replaces an earlier one.

    Works for Detectron2's models, called with a list of dictionaries with an ``image``, and for modules called with
    an (N, C, H, W) tensor. Only calls by the thread that entered the block are recorded. So threads may share a model,
    each with a block of its own.
    """
    record, hooks = SamplingRecord(), _Hooks(threading.get_ident())
    handles = [model.register_forward_pre_hook(hooks.before(lambda value: _start(record, value)), with_kwargs=True)]
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, nn.Module):
        set_padded_size = hooks.before(lambda maps: _set_padded_size(record, maps))
        handles.append(backbone.register_forward_pre_hook(set_padded_size, with_kwargs=True))
    for name, module in model.named_modules():
        if isinstance(module, (DeformConvPack, ModulatedDeformConvPack)):
            hook = hooks.after(_pack_hook(record, name, module))
            handles.append(module.conv_offset.register_forward_hook(hook, with_kwargs=True))
        elif isinstance(module, (DeformConv, ModulatedDeformConv)):
            handles.append(module.register_forward_hook(hooks.after(_layer_hook(record, name)), with_kwargs=True))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


class _Hooks(NamedTuple):
    """Makes hooks that look only at the calls of one thread.

    When another thread removes its hooks in the middle of this one's forward pass, PyTorch may still call them, but
    without keyword arguments. That is why they take ``*rest``.
    """

    thread: int

    def before(self, look: Callable[[Any], None]) -> Callable[..., None]:
        """``look`` gets the first argument of the call."""

        def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
            if threading.get_ident() == self.thread:
                look(args[0] if args else next(iter(rest[0].values())))

        return hook

    def after(self, look: Callable[..., None]) -> Callable[..., None]:
        """``look`` gets the module, its arguments, its keyword arguments and its output."""

        def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
            if threading.get_ident() == self.thread:
                look(module, args, *rest)

        return hook


def _start(record: SamplingRecord, images: Any) -> None:
    record.layers.clear()
    if isinstance(images, Tensor):
        record.image_sizes = [_size(images)] * (len(images) if images.ndim == 4 else 1)
    else:
        record.image_sizes = [_size(sample["image"]) for sample in images]
    record.padded_size = record.image_size


def _size(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]


def _set_padded_size(record: SamplingRecord, images: Tensor) -> None:
    record.padded_size = _size(images)


def _add(record: SamplingRecord, name: str, layer: Any, x: Tensor, offset: Tensor, mask: Tensor | None) -> None:
    with torch.no_grad():
        locations = deform_conv2d_locations(
            offset.detach().float(), layer.kernel_size, layer.stride, layer.padding, layer.dilation
        )
        modulation = torch.ones_like(locations[..., 0]) if mask is None else mask.float().reshape(locations.shape[:-1])
    record.layers.append(LayerSamples(name, locations.cpu(), modulation.detach().cpu(), _size(x)))


def _layer_hook(record: SamplingRecord, name: str) -> Any:
    def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        values = dict(zip(("x", "offset", "mask"), args, strict=False)) | kwargs
        offset, mask = values["offset"], values.get("mask")
        if mask is None and isinstance(layer, ModulatedDeformConv):
            offset, mask = split_offset_and_mask(offset)
        _add(record, name, layer, values["x"], offset, mask)

    return hook


def _pack_hook(record: SamplingRecord, name: str, pack: nn.Module) -> Any:
    """Makes a hook for the offset branch of a layer that has one: its offsets are seen nowhere else."""

    def hook(branch: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        modulated = isinstance(pack, ModulatedDeformConvPack)
        offset, mask = split_offset_and_mask(output) if modulated else (output, None)
        _add(record, name, pack, args[0], offset, mask)

    return hook


def trace_samples(
    record: SamplingRecord,
    point: tuple[float, float],
    layer: str | None = None,
    depth: int = 3,
    index: int = 0,
    group: int = 0,
) -> list[TracedLayer]:
    """Follows one output point back through consecutive deformable layers.

    The last layer samples kernel_h * kernel_w locations around the point. Each is, rounded to the nearest cell, an
    output of the layer before, which again samples as many: 9, 81, 729 for three 3x3 layers. Locations outside a
    layer's input read zero; they are left out and not followed.

    Cell i of a map of stride s lies at pixel i * s: all strided layers of a ResNet centre output i on input i * stride.

    Args:
        point: (y, x) in pixels of the network's image; the nearest cell of the layer's output is taken.
        layer: the last layer, by parts of its name (see `SamplingRecord.find`); the last recorded one by default.
        depth: how many layers to follow, fewer if there are no more.
        index: which image of the batch.
        group: which deform group.
    """
    last = record.find(layer)
    if 0 in record.padded_size:
        raise ValueError("the record knows no image: call the model itself, and not one of its parts or methods")
    if not all(math.isfinite(value) for value in point):
        raise ValueError(f"point must be (y, x), finite, got {tuple(point)}")
    images, groups = record.layers[last].locations.shape[:2]
    for what, value, count in (("index", index, images), ("group", group, groups)):
        if not 0 <= value < count:
            raise IndexError(f"{what} must be from 0 to {count - 1}, got {value}")
    positions = np.array([point], dtype=np.float64)
    weights = np.ones(1)
    traced: list[TracedLayer] = []
    for samples in reversed(record.layers[max(0, last - depth + 1) : last + 1]):
        cells = np.rint(positions / _stride(record.padded_size, samples.output_size)).astype(int)
        limit = np.array(samples.output_size) - 1
        if not traced:
            cells = cells.clip(0, limit)
        inside = ((cells >= 0) & (cells <= limit)).all(1)
        (rows, columns), weights = cells[inside].T, weights[inside]
        locations = samples.locations[index, group][:, rows, columns].double().numpy()  # (taps, n, 2)
        weights = samples.modulation[index, group][:, rows, columns].double().numpy() * weights  # (taps, n)
        read = ((locations > -1) & (locations < np.array(samples.input_size))).all(-1)
        positions = locations[read] * _stride(record.padded_size, samples.input_size)
        weights = weights[read]
        traced.append(TracedLayer(samples.name, positions, weights))
    return traced


def _stride(image_size: Size, map_size: Size) -> np.ndarray:
    """Pixels per cell: a power of two in a ResNet. It is rounded, because a ResNet rounds odd sizes up."""
    return np.exp2(np.rint(np.log2(np.array(image_size) / np.array(map_size))))
