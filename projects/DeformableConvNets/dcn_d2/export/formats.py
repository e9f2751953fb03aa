# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The formats in which models are written. Each has a module of its own, which imports its runtime when it is used."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from .description import Description

# The suffix of each format's files. The module of a format has its name.
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2", "torchscript": ".ts"}
# The runtime of each format, and the package that it comes from.
RUNTIMES = {
    "onnx": ("ONNX Runtime", "onnxruntime"),
    "openvino": ("OpenVINO", "openvino"),
    "pt2": ("torch.export", "torch"),
    "torchscript": ("TorchScript", "torch"),
}


class Session(Protocol):
    """An exported file that is ready to run. Each format's module has a class of this name.

    Args:
        path: of the file.
        threads: how many the runtime uses; 0 leaves it to the runtime.
    """

    description: Description

    def __init__(self, path: str | os.PathLike[str], threads: int = 0) -> None: ...

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the graph: from inputs by name to outputs by name, as `description` has them."""
        ...


class Format(Protocol):
    """What the module of a format has."""

    Session: type[Session]

    def write(
        self, module: nn.Module, inputs: tuple[Tensor, ...], description: Description, path: Path, **options: Any
    ) -> None:
        """Writes a module, `ExportableDetector` or `ExportableBackbone`, into a file.

        Args:
            module: in evaluation mode.
            inputs: examples, as `dcn_d2.export.shapes.example_inputs` makes them.
            description: says which sizes are free, and goes into the file.
            path: of the file.
            options: of this format.
        """
        ...


def format_module(name: str) -> Format:
    """Imports the module of a format.

    Raises:
        ValueError: there is no such format.
    """
    if name not in SUFFIXES:
        raise ValueError(f"{name!r} is no format; there are {', '.join(SUFFIXES)}")
    return importlib.import_module(f".{name}", __package__)


def format_of(path: str | os.PathLike[str]) -> str:
    """Gives the format of a file, by its suffix.

    Raises:
        ValueError: no format has this suffix.
    """
    suffix = Path(path).suffix
    for name, known in SUFFIXES.items():
        if suffix == known:
            return name
    known_suffixes = ", ".join(f"{suffix} ({name})" for name, suffix in SUFFIXES.items())
    raise ValueError(f"{os.fspath(path)} has the suffix {suffix!r}; exported models have {known_suffixes}")


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether a file has the suffix of an exported model."""
    return Path(path).suffix in SUFFIXES.values()


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """Gives the files that an exported model consists of: OpenVINO keeps the weights beside the graph."""
    from .openvino.weights import weights_of

    return [Path(path), *([weights_of(Path(path))] if format_of(path) == "openvino" else [])]


def is_of_torch(path: str | os.PathLike[str]) -> bool:
    """Whether torch runs a file, with its own threads."""
    return RUNTIMES[format_of(path)][1] == "torch"


def runtime_of(path: str | os.PathLike[str]) -> str:
    """Gives the name of the runtime of a file, and its version."""
    name, package = RUNTIMES[format_of(path)]
    return f"{name} {importlib.metadata.version(package)}"


def open_session(path: str | os.PathLike[str], threads: int = 0) -> Session:
    """Opens an exported file with the runtime of its format.

    Raises:
        ValueError: the suffix is unknown, or dcn_d2 did not write the file.
        FileNotFoundError: there is no such file.
    """
    module = format_module(format_of(path))
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no exported model {os.fspath(path)}")
    return module.Session(path, threads)
