# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Runs exported files beside the modules that they were made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dcn_d2.export.build import export
from dcn_d2.export.check import instances_of
from dcn_d2.export.compare import TOLERANCES, Comparison, Tolerance
from dcn_d2.export.detector import ExportableBackbone, ExportableDetector
from dcn_d2.export.formats import open_session
from dcn_d2.export.shapes import round_up

from .models import images, lively_model

Inputs = dict[str, np.ndarray]
Run = Callable[[Inputs], Mapping[str, np.ndarray]]
OUTPUT_SIZE = (77, 101)
ROUNDING = TOLERANCES["float32"]


def inputs_of(sizes: Sequence[tuple[int, int]], pasted: bool = False, seed: int = 3) -> Inputs:
    """Images of noise, of different heights and widths, on canvases that fit the largest."""
    height, width = (round_up(max(sides), 32) for sides in zip(*sizes))
    inputs = {
        "images": images(len(sizes), height, width, seed).numpy(),
        "image_sizes": np.array(sizes, dtype=np.int64),
    }
    return inputs | ({"output_size": np.array(OUTPUT_SIZE)} if pasted else {})


def exported(row: str, path: Path, opts: Sequence[Any] = (), **options: Any) -> nn.Module:
    """Exports a lively model of a row without checking it; gives the module that the file was made of."""
    cfg, model = lively_model(row, opts=opts)
    export(cfg, path, model=model, check=False, **options)
    dtype = getattr(torch, options.get("dtype", "float32"))
    if options.get("part") == "backbone":
        return ExportableBackbone(model, dtype).eval()
    return ExportableDetector(model, options.get("masks", "boxes"), dtype).eval()


def run_module(module: Any, inputs: Inputs) -> dict[str, np.ndarray]:
    """Runs a module on arrays, as a session runs a file."""
    with torch.no_grad():
        results: tuple[Tensor, ...] = module(*(torch.from_numpy(array) for array in inputs.values()))
    return {name: result.numpy() for name, result in zip(module.names, results)}


def assert_same(path: Path, module: Any, *batches: Inputs, tolerance: Tolerance = ROUNDING) -> None:
    """Demands that a file gives what the module gives that it was made of, for each batch."""
    session = open_session(path)
    for inputs in batches:
        assert_close(session.run(inputs), run_module(module, inputs), inputs, tolerance)


def assert_close(
    found: Mapping[str, np.ndarray],
    expected: dict[str, np.ndarray],
    inputs: Inputs,
    tolerance: Tolerance = ROUNDING,
) -> None:
    """Demands the same feature maps, or the same detections in any order."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
    comparison = Comparison()
    if "boxes" not in expected:
        comparison.add_features({name: torch.as_tensor(value) for name, value in expected.items()}, found)
    else:
        for number, size in enumerate(inputs["image_sizes"].tolist()):
            output_size = tuple(inputs.get("output_size", size))
            one, other = (instances_of(dict(each), number, tuple(size), output_size) for each in (expected, found))
            assert len(one) > 5
            comparison.add(one, other, float(one.scores.min()), tolerance)
    assert not (problems := comparison.problems(tolerance)), problems
