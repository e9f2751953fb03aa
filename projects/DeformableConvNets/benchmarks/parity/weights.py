# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Weights of a detector in MMDetection's layout that anyone can make again from a seed: numpy, names and shapes.

Random weights prove something only if every part of the detector does some work: offsets move samples by pixels, norms
are not the identity, scores lie on both sides of the threshold, boxes overlap. So every layer's weight is a uniform
random tensor times a gain that gives its outputs a wanted spread, and the last layers' biases remove the mean. Gains
and centres are measured once, on MMDetection's model (`benchmarks.parity.oracle.calibrate`).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

# The standard deviation that outputs get, for layers that predict something; all other layers get 1.
_SPREADS = (
    (r".*\.conv_offset", 1.5),  # pixels of the map, and logits of the modulation
    (r".*\.offset_fc\.4", 0.7),  # shares of a tenth of the RoI
    (r".*\.mask_fc\.2", 1.5),
    (r"rpn_head\.rpn_reg", 0.2),
    (r".*\.fc_cls", 3.0),
    (r".*\.fc_reg", 0.4),
    (r".*\.conv_logits", 2.0),
)
# Layers whose outputs differ little from place to place, around a large mean that their bias has to remove.
_CENTRED = re.compile(r".*\.(shared_fcs\.\d|fc_cls|fc_reg|rpn_cls|rpn_reg|conv_logits)|.*\.(offset_fc\.4|mask_fc\.2)")
# The mean that outputs get, where it is not 0. For proposals: MMDetection ranks them by the sigmoid of their logit,
# Detectron2 by the logit. The order is the same as long as no two sigmoids round to the same number, which happens with
# large logits. For masks: with a mean of 0 they would be noise, with most pixels close to an edge.
_MEANS = {"rpn_cls": -3.0, "conv_logits": 2.0}


def spread(layer: str) -> float:
    """The standard deviation that a layer's outputs get."""
    return next((value for pattern, value in _SPREADS if re.fullmatch(pattern, layer)), 1.0)


def mean(layer: str) -> float:
    """The mean that a centred layer's outputs get."""
    return _MEANS.get(layer.rpartition(".")[2], 0.0)


def is_centred(layer: str) -> bool:
    """Whether the bias of a layer makes the mean of its outputs `mean`, plus noise."""
    return _CENTRED.fullmatch(layer) is not None


def uniform(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """Uniform in (-1, 1), float32, the same on every machine: no library function is involved that could round."""
    generator = np.random.RandomState([seed, zlib.crc32(name.encode())])  # its streams are frozen, unlike Generator's
    return (2 * generator.random_sample(tuple(shape)) - 1).astype(np.float32)


def seeded_tensor(
    name: str, shape: Sequence[int], seed: int, gain: float = 1.0, centre: np.ndarray | None = None
) -> np.ndarray:
    """One tensor of a state dict.

    Args:
        name: the name in MMDetection's layout; the layer is what precedes the last dot.
        shape: its shape.
        seed: of the whole state dict.
        gain: factor of a layer's weight.
        centre: what a layer's bias starts from, instead of 0.
    """
    layer, _, kind = name.rpartition(".")
    if kind == "num_batches_tracked":
        return np.zeros(tuple(shape), np.int64)
    noise = uniform(name, shape, seed)
    norm = re.search(r"\.?bn\d$|\.downsample\.1$", layer)
    if kind == "running_var" or (norm and kind == "weight"):
        # The last norm of a branch is smaller, or activations would grow from block to block.
        scale = 0.5 if layer.endswith(".bn3") and kind == "weight" else 1.0
        return np.float32(scale) * (1 + np.float32(0.5) * noise)
    if kind == "running_mean" or norm:
        return np.float32(0.3) * noise
    if kind == "bias":
        noise *= np.float32(0.3 * spread(layer))
        return noise if centre is None else noise + centre.astype(np.float32)
    return np.float32(gain) * noise


def seeded_state_dict(
    shapes: Mapping[str, Sequence[int]], seed: int, gains: Mapping[str, float], centres: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A whole state dict; `gains` and `centres` go by the name of the tensor."""
    return {
        name: seeded_tensor(name, shape, seed, gains.get(name, 1.0), centres.get(name))
        for name, shape in shapes.items()
    }


def evenly_spaced_indices(count: int, wanted: int) -> np.ndarray:
    """Indices of `wanted` members spread evenly over `count`, or all of them; replaces a random sample."""
    return np.arange(count) if count <= wanted else np.linspace(0, count - 1, wanted).round().astype(np.int64)
