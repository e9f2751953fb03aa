# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""TorchScript: traced programs that PyTorch runs from Python and C++.

A file needs the operators of dcn_d2 and torchvision's RoIAlign where it runs, that is their compiled libraries, but
neither Detectron2 nor the Python code of dcn_d2. It is a program, which may call any operator of PyTorch, also ones
that read and write files: load only files that you trust.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import write_atomically
from .description import Description
from .torch_files import EXTRA_FILE, Archive, TorchSession, explained, without_expected_warnings


def write(
    module: nn.Module, inputs: tuple[Tensor, ...], description: Description, path: Path, freeze: bool = False
) -> None:
    """Traces a module and writes the trace, which takes all sizes and batches, also where `description` fixes them.

    Args:
        module: in evaluation mode.
        inputs: examples, with which it is traced.
        description: goes into the file.
        path: of the file.
        freeze: whether weights become constants, and are multiplied with the norms after them. A backbone of ResNet-50 was
            5 % faster on one core. It rounds otherwise than the model; without it, results have the same bits, but
            for modulated convolutions.
    """
    with torch.no_grad(), without_expected_warnings():
        # torch's own check runs the module once more with the same inputs, which proves little.
        traced: Any = torch.jit.trace(module, inputs, check_trace=False)
        if freeze:
            traced = torch.jit.freeze(traced)
        with write_atomically(path) as file:
            torch.jit.save(traced, file, _extra_files={EXTRA_FILE: description.to_json()})


class Session(TorchSession):
    """A TorchScript file that dcn_d2 wrote, ready to run on the CPU.

    The file is a program: trust it before you load it.

    Args:
        path: of the file.
        threads: how many PyTorch uses while it runs; 0 leaves it to `torch.set_num_threads`.

    Raises:
        ValueError: dcn_d2 did not write the file, or it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 0) -> None:
        description = Archive(path).description()
        with explained(path):
            program = torch.jit.load(os.fspath(path), map_location="cpu")
        super().__init__(description, program, threads)
