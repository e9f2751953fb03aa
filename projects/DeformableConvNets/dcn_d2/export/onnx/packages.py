# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The optional packages of this format. They are imported when they are used."""

from __future__ import annotations

import importlib
import re
from typing import Any

# Package to the least version that does what is needed here. ONNX Runtime has DeformConv from 1.25.0 on.
LEAST = {"onnx": "1.20", "onnxscript": "0.7", "onnxruntime": "1.25"}


def load(*names: str) -> list[Any]:
    """Imports packages of `LEAST`.

    Raises:
        ImportError: one is missing or too old; the message is the line for pip.
    """
    modules = []
    for name in names:
        pip = f'pip install "{name}>={LEAST[name]}"'
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"ONNX files need {name}, which cannot be imported ({error}): {pip}") from error
        if _numbers(module.__version__) < _numbers(LEAST[name]):
            raise ImportError(
                f"ONNX files need {name} {LEAST[name]} or later, and {module.__version__} is installed: {pip}"
            )
        modules.append(module)
    return modules


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
