# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The operators and their gradients in numpy and float64, written independently: the campaign compares with them.

A sample is a row of a matrix that multiplies the pixels of an image, so that outputs are products of matrices and
gradients are products with their transposes. Every function is computed twice, the second time with absolute values
everywhere. Those magnitudes bound what rounding can do: an error is measured as a share of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# Name -> exact values, their magnitudes, and which values are comparable: rounding cannot move them across a jump.
Results = dict[str, tuple[Array, Array, Any]]


@dataclass
class Axis:
    """What samples at positions of shape (...) read along one axis of `size` pixels.

    `weight` (..., size) is the share of each pixel, `slope` its derivative by the position, and `inside` (...) says
    which samples count.
    """

    weight: Array
    slope: Array
    inside: NDArray[np.bool_]


def _axis(position: Array, size: int, inside: NDArray[np.bool_], clamp: bool, ceil: bool) -> Axis:
    """Interpolates between floor and floor + 1 where a position is `inside`.

    With `clamp`, a position off the map moves to the first or last pixel, and does not depend on the offset there. With
    `ceil`, a whole position has only one neighbour.
    """
    weight, slope = np.zeros((*position.shape, size)), np.zeros((*position.shape, size))
    safe = np.where(inside, position, 0.0)
    fixed = np.zeros_like(inside)
    if clamp:
        moved = np.clip(safe, 0, max(size - 1, 0))
        # The last pixel has no neighbour behind it, so it counts as clamped; the first is clamped below zero only.
        fixed = (safe < 0) | (safe >= size - 1)
        safe = moved
    low = np.floor(safe)
    fraction = safe - low
    if ceil:
        fixed |= fraction == 0
    for side in (0, 1):
        pixel = low + side
        exists = inside & (pixel >= 0) & (pixel < size)
        index = np.where(exists, pixel, 0).astype(int)
        at: Any = (*np.indices(position.shape), index)
        if size:
            weight[at] += np.where(exists, fraction if side else 1 - fraction, 0)
            slope[at] += np.where(exists & ~fixed, 2 * side - 1, 0)
    return Axis(weight, slope, inside)


def deform_conv2d(
    values: dict[str, Array], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Results:
    """Output, and gradients by all operands, of deform_conv2d for the output gradient `grad`."""
    image, offset, weight, grad = values["input"], values["offset"], values["weight"], values["grad"]
    n, c, height, width = image.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    out_h, out_w = offset.shape[2:]
    taps, positions = kernel_h * kernel_w, out_h * out_w
    groups, deform_groups = c // group_channels, offset.shape[1] // (2 * taps)
    tap_y, tap_x = np.repeat(np.arange(kernel_h), kernel_w), np.tile(np.arange(kernel_w), kernel_h)
    moved = offset.reshape(n, deform_groups, taps, 2, out_h, out_w)
    start_y = (np.arange(out_h) * stride[0] - padding[0])[:, None] + (tap_y * dilation[0])[:, None, None]
    start_x = (np.arange(out_w) * stride[1] - padding[1])[None, :] + (tap_x * dilation[1])[:, None, None]

    def axis(position: Array, size: int) -> Axis:
        flat = position.reshape(n, deform_groups, taps * positions)
        return _axis(flat, size, (flat > -1) & (flat < size), clamp=False, ceil=False)

    y, x = axis(start_y + moved[:, :, :, 0], height), axis(start_x + moved[:, :, :, 1], width)

    def samples(rows: Array, columns: Array) -> Array:
        return (rows[..., :, None] * columns[..., None, :]).reshape(n, deform_groups, taps * positions, height * width)

    matrix, by_y, by_x = samples(y.weight, x.weight), samples(y.slope, x.weight), samples(y.weight, x.slope)
    mask = values["mask"] if "mask" in values else np.ones((n, deform_groups * taps, out_h, out_w))
    bias = values["bias"] if "bias" in values else np.zeros(out_channels)

    def compute(size: Any) -> dict[str, Array]:
        flows, kernels, factors = size(grad), size(weight), size(mask)
        pixels = size(image).reshape(n, deform_groups, c // deform_groups, height * width)
        factor = factors.reshape(n, deform_groups, 1, taps * positions)
        sampled = pixels @ matrix.swapaxes(2, 3)
        columns = (sampled * factor).reshape(n, groups, group_channels * taps, positions)
        kernel = kernels.reshape(groups, out_channels // groups, group_channels * taps)
        output = (kernel @ columns).reshape(n, out_channels, out_h, out_w) + size(bias)[:, None, None]
        flow = flows.reshape(n, groups, out_channels // groups, positions)
        by_columns = (kernel.swapaxes(1, 2) @ flow).reshape(n, deform_groups, c // deform_groups, taps * positions)
        found = {"output": output}
        found["input"] = ((by_columns * factor) @ matrix).reshape(image.shape)
        found["weight"] = (flow @ columns.swapaxes(2, 3)).sum(0).reshape(weight.shape)
        found["bias"] = flows.sum((0, 2, 3))
        found["mask"] = (by_columns * sampled).sum(2).reshape(mask.shape)
        moves = [(by_columns * factor * (pixels @ each.swapaxes(2, 3))).sum(2) for each in (size(by_y), size(by_x))]
        stacked = np.stack([each.reshape(n, deform_groups, taps, positions) for each in moves], 3)
        found["offset"] = stacked.reshape(offset.shape)
        return found

    exact, sizes = compute(np.asarray), compute(np.abs)
    return {name: (exact[name], sizes[name], None) for name in exact}


def modulated_deform_conv2d(values: dict[str, Array], **geometry: Sequence[int]) -> Results:
    """Gives the same as deform_conv2d, for the output of an offset branch."""
    joint = values["offset_and_mask"]
    logits = joint.shape[1] // 3
    mask = 1 / (1 + np.exp(-joint[:, 2 * logits :]))
    found = deform_conv2d(values | {"offset": joint[:, : 2 * logits], "mask": mask}, **geometry)
    # 1 - mask loses digits to rounding when the mask is near 1, as in torch's own derivative of the sigmoid.
    factors = (mask * (1 - mask), mask)
    parts = [(found["offset"][i], found["mask"][i] * factor) for i, factor in enumerate(factors)]
    del found["mask"], found["offset"]
    exact, sizes = (np.concatenate(part, 1) for part in parts)
    return found | {"offset_and_mask": (exact, sizes, None)}


@dataclass
class Bins:
    """Of one RoI and one block of channels: what its bins read, (out_h, out_w, size) for each axis."""

    y: Array
    x: Array
    slope_y: Array  # the derivative of y by an offset of 1
    slope_x: Array
    size_y: Array  # magnitudes of these
    size_x: Array
    slope_size_y: Array
    slope_size_x: Array
    average: Array  # (out_h, out_w)
    near_edge: NDArray[np.bool_]  # (out_h, out_w), whether rounding may move a sample onto the map or off it
    near_pixel: NDArray[np.bool_]  # or over a pixel, where the slope jumps


# Where the arithmetic is not exact, positions closer than this to a jump are not compared.
NEAR = 1e-3


def _reach(weight: Array) -> Array:
    """How many of a bin's samples (out_h, out_w, samples, size) touch a pixel or one beside it.

    A position that is rounded changes these weights by the same amount, however small they are.
    """
    touched = (weight > 0).astype(float)
    beside = np.pad(touched, [(0, 0)] * 3 + [(1, 1)])
    return (touched + beside[..., :-2] + beside[..., 2:]).sum(2)


def _bins(
    y: Array, x: Array, size: tuple[int, int], units: tuple[float, float], half_pixel: bool, count: int | None
) -> Bins:
    """Sums up the samples of each bin, at all pairs of y (out_h, out_w, samples) and x."""
    axes, edges, pixels = [], [], []
    for position, length in ((y, size[0]), (x, size[1])):
        low, high = (-0.5, length - 0.5) if half_pixel else (-1, length)
        inside = (position >= low) & (position <= high) & (length > 0)
        axes.append(_axis(position, length, inside, clamp=True, ceil=half_pixel))
        finite = np.where(np.isfinite(position), position, 1e9)
        edges.append(np.asarray((np.minimum(np.abs(finite - low), np.abs(finite - high)) < NEAR).any(-1)))
        pixels.append(np.asarray((np.abs(finite - np.round(finite)) < NEAR).any(-1)))
    first, second = axes
    samples = first.inside.sum(-1) * second.inside.sum(-1) if count is None else np.full(y.shape[:2], count)
    average = np.where(samples > 0, 1 / np.maximum(samples, 1), 0.0)
    moves = [np.nan_to_num(unit, posinf=0, neginf=0) for unit in units]
    return Bins(
        first.weight.sum(2),
        second.weight.sum(2),
        first.slope.sum(2) * moves[0],
        second.slope.sum(2) * moves[1],
        first.weight.sum(2) + _reach(first.weight),
        second.weight.sum(2) + _reach(second.weight),
        np.abs(first.slope).sum(2) * abs(moves[0]),
        np.abs(second.slope).sum(2) * abs(moves[1]),
        average,
        edges[0] | edges[1],
        pixels[0] | pixels[1],
    )


def _pool(
    values: dict[str, Array],
    output_size: Sequence[int],
    bins_of: Any,
    group: int,
    cells: NDArray[np.int_],
    parts: NDArray[np.int_],
    part_size: Sequence[int],
    trusted: bool,
) -> Results:
    """Output and gradients of a pooling whose bins `bins_of(roi, offsets (2, out_h, out_w))` gives."""
    image, rois, grad = values["input"], values["rois"], values["grad"]
    (out_h, out_w), (height, width) = output_size, image.shape[2:]
    channels = grad.shape[1]
    offset = values.get("offset")
    shape = (len(rois), 2, *part_size) if offset is None else offset.shape
    blocks = shape[1] // 2
    mask = values["mask"] if "mask" in values else np.ones((len(rois), 1, out_h, out_w))
    kinds: list[dict[str, Array]] = []
    sure = {
        name: np.ones(size, bool) for name, size in (("output", grad.shape), ("offset", shape), ("mask", mask.shape))
    }
    sure["input"] = np.ones(image.shape, bool)
    for _ in range(2):
        zeros = {"output": grad.shape, "input": image.shape, "offset": shape, "mask": mask.shape}
        kinds.append({name: np.zeros(size) for name, size in zeros.items()})
    for r, roi in enumerate(rois):
        n = int(roi[0])
        for block in range(blocks):
            at = slice(block * channels // blocks, (block + 1) * channels // blocks)
            planes = np.zeros((2, *part_size)) if offset is None else offset[r, 2 * block : 2 * block + 2]
            bins = bins_of(roi[1:], planes.reshape(2, -1)[:, parts])
            for found, absolute in zip(kinds, (False, True)):
                size = np.abs if absolute else np.asarray
                rows, columns = (bins.size_y, bins.size_x) if absolute and not trusted else (bins.y, bins.x)
                # (channels, out_h, out_w, height, width): what each bin's pixels are.
                pixels = size(image[n]).reshape(channels, group, height, width)[at][:, cells]
                flow, factor = size(grad[r, at]), size(mask[r, 0]) * bins.average
                slopes = (bins.slope_size_y, bins.slope_size_x) if absolute else (bins.slope_y, bins.slope_x)
                plain = np.einsum("hwi,hwj,chwij->chw", rows, columns, pixels)
                found["output"][r, at] = plain * factor
                found["mask"][r, 0] += (flow * plain).sum(0) * bins.average
                spread = np.einsum("hwi,hwj,chw->chwij", rows, columns, flow * factor)
                target = found["input"][n].reshape(channels, group, height, width)[at]
                for h in range(out_h):
                    for w in range(out_w):
                        target[:, cells[h, w]] += spread[:, h, w]
                by_y = (flow * np.einsum("hwi,hwj,chwij->chw", slopes[0], columns, pixels)).sum(0) * factor
                by_x = (flow * np.einsum("hwi,hwj,chwij->chw", rows, slopes[1], pixels)).sum(0) * factor
                into = found["offset"][r, 2 * block : 2 * block + 2].reshape(2, -1)
                np.add.at(into[0], parts, by_x)
                np.add.at(into[1], parts, by_y)
            if trusted:
                continue
            sure["output"][r, at] &= ~bins.near_edge
            sure["mask"][r, 0] &= ~bins.near_edge
            near = np.zeros(int(np.prod(part_size)), bool)
            np.logical_or.at(near, parts, bins.near_edge | bins.near_pixel)
            sure["offset"][r, 2 * block : 2 * block + 2] &= ~near.reshape(part_size)
            if bins.near_edge.any():
                sure["input"][n] = False
    return {name: (kinds[0][name], kinds[1][name], sure[name]) for name in kinds[0]}


def deform_roi_pool(
    values: dict[str, Array],
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    trusted: bool,
) -> Results:
    """Output and gradients of deform_roi_pool. Unless `trusted`, values near a jump are not compared."""
    out_h, out_w = output_size

    def bins_of(roi: Array, offset: Array) -> Bins:
        x0, y0, x1, y1 = roi * spatial_scale - 0.5
        height, width = y1 - y0, x1 - x0
        finite = bool(np.isfinite(height) and np.isfinite(width))
        steps = [(height if finite else 0.0) / out_h, (width if finite else 0.0) / out_w]
        grids = [sampling_ratio or max(int(np.ceil(step)), 0) if finite else 0 for step in steps]
        centres = [(np.arange(grid) + 0.5) / max(grid, 1) for grid in grids]
        if not finite:
            x0 = y0 = height = width = 0.0
        y = y0 + (np.arange(out_h)[:, None, None] + centres[0]) * steps[0] + (gamma * height * offset[1])[..., None]
        x = x0 + (np.arange(out_w)[None, :, None] + centres[1]) * steps[1] + (gamma * width * offset[0])[..., None]
        y, x = np.broadcast_to(y, (out_h, out_w, grids[0])), np.broadcast_to(x, (out_h, out_w, grids[1]))
        units = (gamma * height, gamma * width)
        bins = _bins(y, x, values["input"].shape[2:], units, False, max(grids[0] * grids[1], 1))
        if not sampling_ratio and any(abs(step - round(step)) < NEAR for step in steps):
            bins.near_edge[:] = True  # the number of samples jumps
        return bins

    parts = np.arange(out_h * out_w).reshape(out_h, out_w)
    return _pool(values, output_size, bins_of, 1, np.zeros((out_h, out_w), int), parts, output_size, trusted)


def deform_psroi_pool(
    values: dict[str, Array],
    output_size: Sequence[int],
    spatial_scale: float,
    group_size: int,
    part_size: Sequence[int],
    sample_per_part: int,
    trans_std: float,
    trusted: bool,
) -> Results:
    """Output and gradients of deform_psroi_pool. Unless `trusted`, values near a jump are not compared."""
    out_h, out_w = output_size

    def bins_of(roi: Array, offset: Array) -> Bins:
        rounded = np.sign(roi) * np.floor(np.abs(roi) + 0.5)
        x0, y0 = rounded[:2] * spatial_scale - 0.5
        x1, y1 = (rounded[2:] + 1) * spatial_scale - 0.5
        places, units = [], []
        index = (np.arange(out_h)[:, None, None], np.arange(out_w)[None, :, None])
        for start, end, bins, each, move in (
            (y0, y1, out_h, index[0], offset[1]),
            (x0, x1, out_w, index[1], offset[0]),
        ):
            size = max(end - start, 0.1) if np.isfinite(end - start) else np.nan
            step = size / bins
            edges = np.arange(sample_per_part) / sample_per_part * step
            position = start + each * step + edges + (move * trans_std * size)[..., None]
            places.append(np.broadcast_to(position, (out_h, out_w, sample_per_part)))
            units.append(trans_std * size)
        return _bins(places[0], places[1], values["input"].shape[2:], tuple(units), True, None)  # type: ignore[arg-type]

    rows, columns = np.arange(out_h)[:, None], np.arange(out_w)[None, :]
    cells = rows * group_size // out_h * group_size + columns * group_size // out_w
    parts = rows * part_size[0] // out_h * part_size[1] + columns * part_size[1] // out_w
    return _pool(values, output_size, bins_of, group_size**2, cells, parts, part_size, trusted)
