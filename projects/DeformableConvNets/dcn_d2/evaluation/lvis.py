# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""LVIS's evaluation with today's NumPy."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from detectron2.evaluation import LVISEvaluator

from .replaced import replaced


class LVISEvaluatorForAnyNumPy(LVISEvaluator):
    """Detectron2's `LVISEvaluator`, which runs with NumPy 1.24 and later; arguments as there.

    lvis 0.5.3, the newest version, asks NumPy for `np.float`, which was Python's float and is gone since 1.24.
    """

    def _eval_predictions(self, predictions: list[dict[str, Any]]) -> None:
        import lvis.eval

        with replaced(lvis.eval, "np", _NumPyWithFloat("numpy")):
            super()._eval_predictions(predictions)


class _NumPyWithFloat(ModuleType):
    float = float

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)
