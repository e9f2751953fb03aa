# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The names of classes that a file of weights says about itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from .names import shown
from .path_handlers import find_weights
from .provenance import read_class_names
from .reader import peek

logger = logging.getLogger(__name__)


def peek_class_names(weights: str) -> tuple[str, ...]:
    """Gives the names of the classes of a value of MODEL.WEIGHTS, () if it does not say them; an address is fetched."""
    if not weights:
        return ()
    return read_class_names(peek(weights if os.path.isfile(weights) else find_weights(weights)))


def check_class_names(ours: Sequence[str], theirs: Sequence[str], origin: str, *, resume: bool) -> None:
    """Checks that weights are of a model with the same classes.

    Args:
        ours: the names of the model's classes; empty if they are not known.
        theirs: those that the weights say about themselves; empty if they say none.
        origin: names the weights in messages.
        resume: a training goes on, so that the names must be equal. Otherwise other spellings are a warning only.

    Raises:
        ValueError: A class has another number there than here.
    """
    ours, theirs = list(ours), list(theirs)
    if not ours or not theirs or ours == theirs:
        return
    both = f"{origin} is of a model with the classes {_listed(theirs)}, but here the classes are {_listed(ours)}"
    moved = [name for name in ours if name in theirs and theirs.index(name) != ours.index(name)]
    if resume:
        raise ValueError(f"{both}: a run goes on only with the classes it began with. Take another OUTPUT_DIR")
    if moved:
        first = moved[0]
        raise ValueError(
            f"{both}: {shown(first)} is class {theirs.index(first)} there, class {ours.index(first)} here, and a model "
            "knows classes by their numbers. Take the config.yaml of the training, or name the classes in the "
            "training's order in DATASETS.CLASS_NAMES"
        )
    logger.warning(f"{both}. Classes count by their place in the list, whatever they are called")


def describe_fine_tuning(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """Says how classes of a model relate to those of the weights that its training starts from; "" if nothing does."""
    ours, theirs = list(ours), list(theirs)
    if not ours or not theirs or ours == theirs:
        return ""
    shared = [name for name in ours if name in theirs]
    if len(ours) == len(theirs):
        return (
            f"its classes are called {_listed(theirs)}, here {_listed(ours)}: as there are as many, the classifiers "
            "start from those classes, place by place"
        )
    if len(shared) == len(ours):
        return f"all {len(ours)} classes are among its {len(theirs)} ({_listed(ours)}); the classifiers learn them anew"
    if shared:
        return f"of the {len(ours)} classes, its {len(theirs)} have {_listed(shared)}; the classifiers learn all anew"
    return ""


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + more
