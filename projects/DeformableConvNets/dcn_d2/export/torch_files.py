# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the files of torch.export and of TorchScript share: both are archives of PyTorch, which PyTorch itself runs."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: F401  its RoIAlign is in the graphs
from torch import Tensor

from .description import KEY, Description

# The extra file of an archive that holds the description.
EXTRA_FILE = f"{KEY}.json"
# The beginnings of warnings that say nothing about the result, as regular expressions: that TorchScript is old, that
# Python values are constants in a graph, which the tests compare at other sizes, and what Detectron2 causes.
_EXPECTED = (
    ".*torch.jit.* is deprecated",
    "Converting a tensor to a Python",
    "torch.meshgrid. in an upcoming release",
    "No complete tensor found in the group",  # means that a weight is a part of another tensor
)


@contextmanager
def without_expected_warnings() -> Iterator[None]:
    """Ignores the warnings that writing and reading these files always cause."""
    with warnings.catch_warnings():
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message=message)
        yield


class Archive:
    """The files in an archive of PyTorch, read as data: nothing in them runs.

    Args:
        path: of the archive.

    Raises:
        ValueError: it is no such archive, or it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            with zipfile.ZipFile(path) as archive:
                if broken := archive.testzip():
                    raise ValueError(
                        f"{self.path} is damaged: the checksum of {broken} in it is wrong. Export it again"
                    )
                # PyTorch puts all files into one folder, whose name does not matter.
                self._names = {info.filename.partition("/")[2]: info.filename for info in archive.infolist()}
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{self.path} is damaged, or not a file that dcn_d2 exported: it is no archive of PyTorch"
            ) from error

    @property
    def names(self) -> Sequence[str]:
        """The names of the files in it."""
        return tuple(self._names)

    def read(self, name: str) -> str:
        """Gives the text of a file in it.

        Raises:
            ValueError: there is no such text.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(self._names[name]).decode()
        except (KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} was not exported by dcn_d2: it holds no text {name}") from error

    def description(self) -> Description:
        """Reads the description from the extra file.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        return Description.from_json(self.read(f"extra/{EXTRA_FILE}"), self.path)


@contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what PyTorch raises when it cannot load a file into a ValueError that names the file."""
    try:
        with without_expected_warnings():
            yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"PyTorch {torch.__version__} cannot load {os.fspath(path)}: {reason}. It may come from a later version; "
            "export it with this one"
        ) from error


class TorchSession:
    """Runs a function of tensors on arrays.

    Args:
        description: of the inputs and outputs.
        function: takes and gives tensors in the order of `description`.
        threads: how many PyTorch uses while it runs; 0 leaves it to `torch.set_num_threads`.
    """

    def __init__(self, description: Description, function: Callable[..., Any], threads: int = 0) -> None:
        self.description = description
        self._function = function
        self._threads = threads

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the graph: from inputs by name to outputs by name, as `description` has them."""
        tensors = [torch.from_numpy(np.ascontiguousarray(inputs[info.name])) for info in self.description.inputs]
        with torch.inference_mode(), _threads(self._threads):
            outputs: Sequence[Tensor] = self._function(*tensors)
        return {info.name: output.numpy() for info, output in zip(self.description.outputs, outputs)}


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if number in (0, before):
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
