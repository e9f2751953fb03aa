# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""ONNX files of small models. Writing one takes some 20 seconds, so all tests of a row share its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dcn_d2.export.description import Description, TensorInfo
from dcn_d2.export.detector import ExportableBackbone, ExportableDetector
from dcn_d2.export.onnx import write
from dcn_d2.export.shapes import BATCH, example_inputs, input_tensors

from ..models import lively_model


class Written(NamedTuple):
    """A model, and the file that was written of it."""

    model: Any
    path: Path
    description: Description


Write = Callable[..., Written]


def describe(module: Any, row: str = "row", batch: int | None = None, **values: Any) -> Description:
    """Describes a module; the shapes of its results are those with an example."""
    masks = getattr(module, "masks", "none")
    size = values.get("size")
    defaults: dict[str, Any] = {
        "part": "detector",
        "class_names": ("cat", "dog"),
        "weights": "",
        "weights_digest": "0",
        "channel_order": "BGR",
        "pixel_mean": (0.0, 0.0, 0.0),
        "pixel_std": (1.0, 1.0, 1.0),
        "size": size,
        "size_divisibility": 32,
        "dtype": "float32",
        "detections_per_image": 100,
        "min_size_test": 64,
        "max_size_test": 100,
        "inputs": input_tensors(3, size, batch, masks == "pasted"),
        "outputs": (),
        "config": "",
        "dcn_d2_version": "1",
    }
    description = Description(row=row, batch=batch, masks=masks, **(defaults | values))
    with torch.no_grad():
        results = module(*example_inputs(description))
    outputs = []
    for name, result in zip(module.names, results):
        shape: list[int | str] = list(result.shape)
        if batch is None:
            shape[0] = BATCH
        if size is None and (description.part == "backbone" or (name, masks) == ("masks", "pasted")):
            shape[2:] = [f"{name}_height", f"{name}_width"]
        outputs.append(TensorInfo(name, str(result.dtype).removeprefix("torch."), tuple(shape)))
    return Description(**{**vars(description), "outputs": tuple(outputs)})


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Gives the file of a row, with `values` of its description. Rows that differ only in their training share it."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("onnx")
    files: dict[Any, Written] = {}

    def write_once(row: str, masks: str = "boxes", opts: tuple[Any, ...] = (), **values: Any) -> Written:
        cfg, model = lively_model(row, opts=opts)
        key = (cfg.MODEL.dump(), masks, *sorted(values.items()))
        if key not in files:
            dtype = getattr(torch, values.get("dtype", "float32"))
            if values.get("part") == "backbone":
                module: Any = ExportableBackbone(model, dtype)
            else:
                module = ExportableDetector(model, masks, dtype)
            description = describe(module.eval(), row, **values)
            path = folder / f"{len(files)}.onnx"
            write(module, example_inputs(description), description, path)
            files[key] = Written(model, path, description)
        return files[key]

    return write_once
