# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Detectron2's evaluators whose packages use names that today's NumPy no longer has."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import numpy as np
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    LVISEvaluator,
    SemSegEvaluator,
)
from detectron2.utils.file_io import PathManager
from PIL import Image

from .replaced import replaced


class _NumPyWithOldNames(ModuleType):
    """NumPy with `float`, which is gone since 1.24, and `in1d`, gone since 2.4."""

    float = float

    @staticmethod
    def in1d(elements: Any, test_elements: Any, invert: bool = False) -> np.ndarray:
        return np.isin(np.ravel(elements), test_elements, invert=invert)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _with_old_names(module: str) -> AbstractContextManager[None]:
    """Lets a module find old names in what it imported as `np`; NumPy itself stays as it is."""
    return replaced(importlib.import_module(module), "np", _NumPyWithOldNames("numpy"))


class LVISEvaluatorForAnyNumPy(LVISEvaluator):
    """Detectron2's `LVISEvaluator`, also where lvis 0.5.3, the newest version, asks NumPy for `float`."""

    def _eval_predictions(self, predictions: list[dict[str, Any]]) -> None:
        with _with_old_names("lvis.eval"):
            super()._eval_predictions(predictions)


class CityscapesInstanceEvaluatorForAnyNumPy(CityscapesInstanceEvaluator):
    """Detectron2's `CityscapesInstanceEvaluator`, also where cityscapesscripts 2.3.0 asks NumPy for `in1d`.

    The package also writes a file `matches.json` into the working directory, which nothing reads, and fails at the
    numbers of NumPy in it. Here it writes no JSON: the scores come back as they are.
    """

    def evaluate(self) -> Any:
        name = "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling"
        with _with_old_names(name), replaced(importlib.import_module(name), "writeDict2JSON", lambda *_: None):
            return super().evaluate()


class CityscapesSemSegEvaluatorForAnyNumPy(CityscapesSemSegEvaluator):
    """Detectron2's `CityscapesSemSegEvaluator`, also where cityscapesscripts 2.3.0 asks NumPy for `in1d`."""

    def evaluate(self) -> Any:
        with _with_old_names("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"):
            return super().evaluate()


class SemSegEvaluatorForAnyNumPy(SemSegEvaluator):
    """Detectron2's `SemSegEvaluator`, whose own function for reading labels fails with NumPy 2."""

    def __init__(self, dataset_name: str, output_dir: str) -> None:
        super().__init__(dataset_name, output_dir=output_dir, sem_seg_loading_fn=_read_labels)


def _read_labels(file_name: str, dtype: type) -> np.ndarray:
    with PathManager.open(file_name, "rb") as file:
        return np.array(Image.open(file), dtype=dtype)
