# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Evaluation as Detectron2's tools/train_net.py has it: evaluators by the data set's type, and test-time augmentation.

What cannot work is refused in words by `check_evaluators`, `check_augmentation` and `check_expected_results`, before
anything runs.
"""

from .augmentation import build_augmented_model, check_augmentation, is_augmented, without_augmentation
from .checks import check_evaluators
from .evaluators import build_evaluator
from .results import Results, add_augmented, check_expected_results

__all__ = [
    "Results",
    "add_augmented",
    "build_augmented_model",
    "build_evaluator",
    "check_augmentation",
    "check_evaluators",
    "check_expected_results",
    "is_augmented",
    "without_augmentation",
]
