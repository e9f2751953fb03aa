# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Runs saved TorchScript models as a program without dcn_d2 does: it has loaded the compiled library, and no more."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

# The file holds pairs of a model's file and its operands.
PROGRAM = """
import sys, torch
library, calls, results = sys.argv[1:]
torch.ops.load_library(library)
with torch.no_grad():
    found = [torch.jit.load(file)(*operands) for file, operands in torch.load(calls)]
assert not any(name.partition(".")[0] in ("dcn_d2", "detectron2", "torchvision") for name in sys.modules)
torch.save(found, results)
"""


def compiled_library() -> str:
    """The file of the compiled library."""
    spec = importlib.util.find_spec("dcn_d2._C")
    assert spec is not None and spec.origin is not None
    return spec.origin


def run_alone(models: list[tuple[Any, tuple[Any, ...]]], folder: Path) -> list[Any]:
    """Saves scripted or traced models, and calls them in a process of their own, which only loads the library."""
    calls = []
    for index, (model, operands) in enumerate(models):
        file = str(folder / f"{index}.ts")
        torch.jit.save(model, file)
        calls.append((file, operands))
    torch.save(calls, folder / "calls.pt")
    files = [compiled_library(), str(folder / "calls.pt"), str(folder / "results.pt")]
    # -P: the folder that the tests run in is not searched for modules.
    done = subprocess.run([sys.executable, "-P", "-c", PROGRAM, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[Any] = torch.load(folder / "results.pt")
    return found
