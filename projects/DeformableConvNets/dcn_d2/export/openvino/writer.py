# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Writes models as OpenVINO's intermediate representation: NAME.xml with the graph, NAME.bin with the weights."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.portable import portable_operators
from ..description import KEY, Description, TensorInfo
from .operators import extensions
from .package import import_openvino, without_telemetry
from .weights import KEY_OF_WEIGHTS, digest_of, weights_of

DTYPES = ("float32", "float16")
_UNKNOWN_DIGEST = "0" * 64


def write(module: nn.Module, inputs: tuple[Tensor, ...], description: Description, path: Path) -> None:
    """Writes a module into a file that OpenVINO reads, and one with its weights beside it, of the suffix .bin.

    OpenVINO's frontend converts a trace, in which sizes are free or fixed as the description says. With dtype
    "float16" the weights are stored in half precision, which halves the files. A CPU computes in float32 all the same.

    Args:
        module: `ExportableDetector` or `ExportableBackbone`, in evaluation mode, in float32.
        inputs: examples.
        description: goes into the file.
        path: of the file, with the suffix .xml. What is there is replaced.

    Raises:
        ImportError: OpenVINO is not installed.
        ValueError: OpenVINO cannot compute in the description's dtype, or has no such operator.
        OSError: the files could not be written.
    """
    if description.dtype not in DTYPES:
        raise ValueError(f"OpenVINO's files hold {' or '.join(DTYPES)}, not {description.dtype}")
    model = convert(module, inputs, description)
    model.set_rt_info(description.to_json(), [KEY])
    _save(model, Path(path), half=description.dtype == "float16")


def convert(module: nn.Module, inputs: tuple[Tensor, ...], description: Description) -> Any:
    """Converts a module into an `openvino.Model`, with the names and the free sizes that the description has."""
    ov = import_openvino()
    shapes = [ov.PartialShape([-1 if isinstance(n, str) else n for n in tensor.shape]) for tensor in description.inputs]
    with portable_operators(), torch.no_grad(), warnings.catch_warnings():
        # Values that become constants in the trace are meant to, and that tracing is deprecated is known.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, inputs, check_trace=False)
        try:
            with without_telemetry():
                model = ov.convert_model(traced, input=shapes, extension=extensions())
        except ov.frontend.OpConversionFailure as error:
            raise ValueError(f"OpenVINO cannot convert the model: {error}") from error
    _name(model.inputs, description.inputs)
    _name(model.outputs, description.outputs)
    return model


def _name(ports: list[Any], tensors: tuple[TensorInfo, ...]) -> None:
    for port, tensor in zip(ports, tensors, strict=True):
        port.get_tensor().set_names({tensor.name})
        port.get_node().set_friendly_name(tensor.name)


def _save(model: Any, path: Path, half: bool) -> None:
    """Saves a model. Whenever this is interrupted, there is the old pair of files, the new one, or no .xml."""
    ov = import_openvino()
    path.parent.mkdir(parents=True, exist_ok=True)
    model.set_rt_info(_UNKNOWN_DIGEST, [KEY_OF_WEIGHTS])
    with tempfile.TemporaryDirectory(prefix=f".{path.name[-200:]}.", suffix=".part", dir=path.parent) as folder:
        part = Path(folder, path.name)
        try:
            ov.save_model(model, part, compress_to_fp16=half)
        except RuntimeError as error:  # a full disk is "basic_ios::clear: iostream error"
            raise OSError(f"{path} could not be written; is the disk full? OpenVINO says: {error}") from error
        # The graph names its weights, so that files of two models do not get mixed up.
        text = part.read_text(encoding="utf-8")
        assert text.count(_UNKNOWN_DIGEST) == 1
        part.write_text(text.replace(_UNKNOWN_DIGEST, digest_of(weights_of(part))), encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.replace(weights_of(part), weights_of(path))
        os.replace(part, path)
