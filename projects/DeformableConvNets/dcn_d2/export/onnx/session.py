# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Runs ONNX files with ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..description import KEY, Description
from .packages import load


class Session:
    """An ONNX file in ONNX Runtime.

    Args:
        path: of the file.
        threads: how many an operator uses; 0 leaves it to the runtime, which takes all cores.
        providers: of ONNX Runtime, in the order in which they are asked for each operator, such as
            ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]. By default CUDA, where this
            build of ONNX Runtime has it, and the CPU.

    Raises:
        ImportError: ONNX Runtime is missing, or is too old to have DeformConv.
        ValueError: the file is damaged, dcn_d2 did not write it, or a provider is not there.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 0, providers: Sequence[str] | None = None) -> None:
        (onnxruntime,) = load("onnxruntime")
        available = onnxruntime.get_available_providers()
        if providers is None:
            providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
        for name in providers:
            if name not in available:
                raise ValueError(f"this ONNX Runtime has no {name}; it has {', '.join(available)}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors
        exact = {"CUDAExecutionProvider": {"use_tf32": "0"}}
        try:
            self._session = onnxruntime.InferenceSession(
                Path(path), options, providers=[(name, exact.get(name, {})) for name in providers]
            )
        except Exception as error:  # its errors have no common class but this
            if not Path(path).is_file():
                raise FileNotFoundError(f"there is no exported model {os.fspath(path)}") from error
            raise ValueError(
                f"{os.fspath(path)} is no ONNX file that ONNX Runtime can load: {_first(error)}"
            ) from error
        text = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        if text is None:
            raise ValueError(f"{os.fspath(path)} was not written by dcn_d2: it does not say what its inputs mean")
        self.description = Description.from_json(text, os.fspath(path))
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the graph: from inputs by name to outputs by name, as `description` has them."""
        return dict(zip(self._names, self._session.run(self._names, dict(inputs))))


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
