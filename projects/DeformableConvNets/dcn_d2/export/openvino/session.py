# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Runs models in OpenVINO."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..description import KEY, Description
from .package import get_core
from .weights import KEY_OF_WEIGHTS, digest_of, weights_of


class Session:
    """A file of OpenVINO that is ready to run. It computes in float32, also where processors have bfloat16.

    Args:
        path: of the .xml file, which `write` wrote. Its .bin file lies beside it.
        threads: how many OpenVINO uses; 0 leaves it to OpenVINO.
        device: one of OpenVINO's, such as "CPU" or "GPU".

    Raises:
        ImportError: OpenVINO is not installed.
        ValueError: one of the files is missing, damaged, or not written by dcn_d2.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 0, device: str = "CPU") -> None:
        self.path = Path(path)
        core = get_core()
        model = _read(core, self.path)
        self.description = Description.from_json(model.get_rt_info([KEY]).astype(str), str(self.path))
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        self._compiled = core.compile_model(model, device, settings)
        self._requests = threading.local()  # a request runs for one thread at a time

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the graph: from inputs by name to outputs by name, as `description` has them.

        Raises:
            ValueError: an input is missing, or has another dtype or shape than the graph's.
        """
        for port in self._compiled.inputs:
            self._check(port, inputs)
        if not hasattr(self._requests, "own"):
            self._requests.own = self._compiled.create_infer_request()
        results = self._requests.own.infer(dict(inputs))
        return {tensor.name: results[tensor.name] for tensor in self.description.outputs}

    def _check(self, port: Any, inputs: Mapping[str, np.ndarray]) -> None:
        """Refuses an array that does not fit: OpenVINO converts a wrong dtype, silently."""
        name, dtype, shape = port.any_name, port.element_type.to_dtype(), port.partial_shape
        if name not in inputs:
            raise ValueError(f"{self.path.name} takes {name}, and got {', '.join(inputs) or 'nothing'}")
        array = inputs[name]
        fits = len(array.shape) == len(shape) and all(
            size.is_dynamic or size.get_length() == n for size, n in zip(shape, array.shape)
        )
        if array.dtype != dtype or not fits:
            sizes = ", ".join("any" if size.is_dynamic else str(size) for size in shape)
            raise ValueError(
                f"{self.path.name} takes {name} of {np.dtype(dtype)} ({sizes}), got {array.dtype} "
                f"({', '.join(map(str, array.shape))})"
            )


def _read(core: Any, path: Path) -> Any:
    """Reads a graph and its weights.

    Raises:
        ValueError: one of the two is missing, damaged, or not written by dcn_d2.
    """
    weights = weights_of(path)
    if not weights.is_file():
        raise ValueError(f"{path} has no weights: {weights.name} must lie beside it")
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        raise ValueError(f"{path} and {weights.name} are not a model of OpenVINO, or are damaged: {error}") from error
    if not (model.has_rt_info([KEY]) and model.has_rt_info([KEY_OF_WEIGHTS])):
        raise ValueError(f"{path} was not written by dcn_d2: it has no description")
    if model.get_rt_info([KEY_OF_WEIGHTS]).astype(str) != digest_of(weights):
        raise ValueError(f"{weights} does not hold the weights of {path.name}: it is damaged or of another model")
    return model
