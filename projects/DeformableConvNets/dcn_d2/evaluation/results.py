# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What an evaluation gives: {task: {metric: value}}, and {data set: {task: {metric: value}}} for several data sets."""

from __future__ import annotations

import numbers
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode

AUGMENTED = "_TTA"  # ends the keys of results with test-time augmentation, as in Detectron2's tools/train_net.py


class Results(OrderedDict):
    """Results of an evaluation; of several data sets, `results["DATA SET/TASK"]` is `results["DATA SET"]["TASK"]`.

    So Detectron2's `verify_results` can compare TEST.EXPECTED_RESULTS with them.
    """

    def __missing__(self, key: str) -> Any:
        name, _, task = key.partition("/")
        if task and task in self.get(name, {}):
            return self[name][task]
        known = [name if not _has_tasks(value) else f"{name}/{task}" for name, value in self.items() for task in value]
        raise KeyError(f"the evaluation has no results for {key!r}, only for {', '.join(dict.fromkeys(known))}")


def _has_tasks(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(task, Mapping) for task in value.values())


def add_augmented(results: Mapping[str, Any], augmented: Mapping[str, Any]) -> Results:
    """Adds results with test-time augmentation to those without; their keys get `AUGMENTED` at the end."""
    return Results({**results, **{f"{key}{AUGMENTED}": value for key, value in augmented.items()}})


def check_expected_results(cfg: CfgNode) -> None:
    """Checks that TEST.EXPECTED_RESULTS can be compared with the evaluation's results."""
    expected, tests = cfg.TEST.EXPECTED_RESULTS, cfg.DATASETS.TEST
    if len(expected) and not tests:
        raise ValueError("TEST.EXPECTED_RESULTS is set, but DATASETS.TEST is empty: there will be nothing to compare")
    names = [*tests, *(f"{name}{AUGMENTED}" for name in tests if cfg.TEST.AUG.ENABLED)]
    for entry in expected:
        if not (
            isinstance(entry, (list, tuple))
            and len(entry) == 4
            and all(isinstance(text, str) for text in entry[:2])
            and all(isinstance(number, numbers.Real) for number in entry[2:])
        ):
            raise ValueError(
                f"TEST.EXPECTED_RESULTS must hold entries like ['bbox', 'AP', 41.3, 0.5] (task, metric, value, "
                f"tolerance), got {entry!r}"
            )
        if len(tests) > 1 and not entry[0].startswith(tuple(f"{name}/" for name in names)):
            raise ValueError(
                f"TEST.EXPECTED_RESULTS has the task {entry[0]!r}, but DATASETS.TEST names {len(tests)} data sets: "
                f"say which one, as in '{tests[0]}/{entry[0]}'"
            )
