# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The error for a wrong config, and the pieces that its messages are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode

from .access import keys_of


class ConfigError(ValueError):
    """A config cannot be read, or a value in it is wrong.

    The message names the file or the key, the value, and what was expected.
    """


def listed(choices: Iterable[Any]) -> str:
    """Gives 'a, b or c'."""
    *first, last = [str(choice) if choice != "" else '""' for choice in choices]
    return f"{', '.join(first)} or {last}" if first else last


def nearest(name: str, names: Iterable[str]) -> str:
    """Gives "; did you mean 'NAME'?" with the most similar of `names`, or "" if none is similar."""
    folded = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), list(folded), n=1)
    return f"; did you mean {folded[close[0]]!r}?" if close else ""


def nearest_key(key: str, cfg: CfgNode) -> str:
    """Gives "; did you mean 'KEY'?" with the most similar key of `cfg`, or "" if none is similar."""
    known = list(keys_of(cfg))
    last = key.rpartition(".")[2]
    same_end = [other for other in known if other.rpartition(".")[2] == last]
    return nearest(key, same_end) or nearest(key, known) or (f"; did you mean {same_end[0]!r}?" if same_end else "")


def shorten(value: Any) -> str:
    """Gives a value as a message shows it, in at most about 200 characters."""
    try:
        shown = repr(value)
    except ValueError:  # Python refuses to print whole numbers of more than 4300 digits
        return "a huge number"
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
