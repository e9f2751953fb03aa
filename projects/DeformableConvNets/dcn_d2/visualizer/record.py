# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Shows where deformable convolutions look: records a model's offsets and draws the sampled locations on the image.

    with record_sampling(predictor.model) as record:
        outputs = predictor(image_bgr)
    draw = SamplingAnnotator(depth=3)
    picture = draw(image_rgb, record, point=(80.0, 120.0), layer="res4")

Positions come from `dcn_d2.ops.sampling`, which the reference operator uses too.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from ..layers import (
    DeformConv,
    DeformConvPack,
    ModulatedDeformConv,
    ModulatedDeformConvPack,
    split_offset_and_mask,
)
from ..ops.sampling import deform_conv2d_locations

ImageLike = TypeVar("ImageLike", np.ndarray, Image.Image)
Color = tuple[int, int, int]
Size = tuple[int, int]
Window = tuple[float, float, float, float]


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
        """That of the first image; (0, 0) before a forward pass."""
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
    an (N, C, H, W) tensor. Only what the thread calls that entered the block is recorded: threads may share a model,
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

    When another thread removes its hooks in the middle of this one's forward pass, PyTorch may still call them, and
    then without keyword arguments: hence ``*rest``.
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
    """The offsets of a layer with its own offset branch are seen only at that branch."""

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
    """Pixels per cell, a power of two in a ResNet; rounded because odd sizes are rounded up on the way."""
    return np.exp2(np.rint(np.log2(np.array(image_size) / np.array(map_size))))


class SamplingAnnotator:
    """Draws the locations that lead to a point, one colour for each layer, on a copy of an image.

    Size and opacity of a dot show its modulation relative to the strongest of its layer. Radii and text scale with
    the image. Calls compose: pass the result back in with another point.

    Args:
        depth: how many deformable layers to follow back.
        colors: RGB, the last layer first; repeated if there are more layers.
        radius: of the last layer's dots in pixels, chosen by the image's size if None.
        label: whether to write the layers' names and numbers of samples.
        group: which deform group's samples to show.
    """

    def __init__(
        self,
        depth: int = 3,
        colors: Sequence[Color] = ((255, 209, 102), (239, 71, 111), (76, 201, 240)),
        radius: float | None = None,
        label: bool = True,
        group: int = 0,
    ) -> None:
        if depth < 1 or not colors:
            raise ValueError(f"depth must be at least 1 and colors not empty, got {depth} and {colors}")
        if radius is not None and not 0 <= radius < math.inf:
            raise ValueError(f"radius must be finite and not negative, got {radius}")
        self.depth, self.colors, self.radius, self.label, self.group = depth, tuple(colors), radius, label, group

    def __call__(
        self,
        image: ImageLike,
        record: SamplingRecord,
        point: tuple[float, float],
        layer: str | None = None,
        window: Window | None = None,
        index: int = 0,
    ) -> ImageLike:
        """Gives an image of the same kind and size.

        Args:
            image: (H, W, 3) uint8 RGB array or PIL image: what the network saw, at any resolution.
            record: of a forward pass, see `record_sampling`.
            point: (y, x) in pixels of ``image``.
            layer: where the point lies, by parts of its name; the last layer by default.
            window: the part (y0, x0, y1, x1) of the network's image that ``image`` shows; all of it by default.
            index: which image of the batch.
        """
        if isinstance(image, Image.Image):
            if image.mode[0] in "IF":
                raise ValueError(f"image must have 8 bits a channel, got one of the mode {image.mode}")
            drawn = self(np.asarray(image.convert("RGB")), record, point, layer, window, index)
            return Image.fromarray(drawn).convert(image.mode)
        if not isinstance(image, np.ndarray):
            raise TypeError(f"image must be a numpy array or a PIL image, got {type(image).__name__}")
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ValueError(f"image must be (H, W, 3) of uint8, got {image.shape} of {image.dtype}")
        if window is None:
            if not 0 <= index < len(record.image_sizes):
                raise IndexError(f"index is {index}, but the record is of {len(record.image_sizes)} images")
            window = (0, 0, *record.image_sizes[index])
        if not (window[0] < window[2] and window[1] < window[3]):  # False for NaN too
            raise ValueError(f"window must be (y0, x0, y1, x1) with an area, got {window}")
        origin = np.array(window[:2])
        scale = np.array(image.shape[:2]) / (np.array(window[2:]) - origin)
        # Half a pixel is added and taken because scaling keeps the image's corner, not its first pixel's centre.
        network_point = (np.array(point) + 0.5) / scale + origin - 0.5
        traced = trace_samples(record, (network_point[0], network_point[1]), layer, self.depth, index, self.group)
        radius = self.radius or max(2.0, min(image.shape[:2]) / 110)
        canvas = image.astype(np.float32)
        for level in reversed(range(len(traced))):
            positions = (traced[level].positions + 0.5 - origin) * scale - 0.5
            dots = _dots(image.shape[:2], positions, traced[level].weights, radius * 0.72**level)
            for color, strength in (((0, 0, 0), dots[0] * 0.7), (self.colors[level % len(self.colors)], dots[1])):
                canvas += (np.array(color, dtype=np.float32) - canvas) * strength[..., None]
        result = canvas.round().astype(np.uint8)
        _cross(result, point, radius)
        below = point[0] < image.shape[0] / 2
        return self._write_label(result, traced, below) if self.label else result

    def _write_label(self, image: np.ndarray, traced: Sequence[TracedLayer], below: bool) -> np.ndarray:
        """Writes one line for each layer, with its colour's dot, into the left corner that is away from the point."""
        size = max(11, round(min(image.shape[:2]) / 32))
        lines = [f"{_short(layer.name)}: {len(layer.positions)} samples" for layer in traced]
        picture = Image.fromarray(image)
        pen = ImageDraw.Draw(picture, "RGBA")
        font = ImageFont.load_default(size)
        step, pad = round(size * 1.35), size // 2
        width = max(pen.textlength(line, font=font) for line in lines) + 3 * pad + size // 2
        height = step * len(lines) + 2 * pad
        top = image.shape[0] - height if below else 0
        pen.rectangle((0, top, width, top + height), fill=(0, 0, 0, 150))
        for level, line in enumerate(lines):
            middle = top + pad + step * (level + 0.5)
            r = size * 0.28 * 0.9**level
            pen.ellipse((pad, middle - r, pad + 2 * r, middle + r), fill=self.colors[level % len(self.colors)])
            pen.text((2 * pad + size // 2, middle), line, font=font, fill=(255, 255, 255), anchor="lm")
        return np.asarray(picture)


def _dots(size: Size, positions: np.ndarray, weights: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Gives the opacities, in [0, 1], of a dark rim and of the dots themselves."""
    rim, dots = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    relative = weights / max(weights.max(initial=0), 1e-12)
    for i in np.argsort(relative):  # the strongest are drawn last, over weaker ones
        # OpenCV takes fractions of a pixel as whole numbers of 1/16.
        y, x = (round(float(value) * 16) for value in positions[i].clip(-1e4, 1e4))
        r, opacity = radius * (0.55 + 0.45 * relative[i]), 0.25 + 0.75 * relative[i]
        cv2.circle(rim, (x, y), round((r + 0.4 * radius) * 16), 255 * opacity, -1, cv2.LINE_AA, 4)
        cv2.circle(dots, (x, y), round(r * 16), 255 * opacity, -1, cv2.LINE_AA, 4)
    return rim.astype(np.float32) / 255, dots.astype(np.float32) / 255


def _cross(image: np.ndarray, point: tuple[float, float], radius: float) -> None:
    center = (round(point[1]), round(point[0]))
    for color, thickness in (((0, 0, 0), 5), ((255, 255, 255), 2)):
        width = max(1, round(thickness * radius / 5))
        cv2.drawMarker(image, center, color, cv2.MARKER_CROSS, round(5 * radius), width, cv2.LINE_AA)


def _short(name: str) -> str:
    """Leaves out the parts that all layers of a backbone share."""
    return ".".join(part for part in name.split(".") if part not in ("backbone", "bottom_up", "conv2")) or name
