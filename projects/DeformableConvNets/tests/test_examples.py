# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Every public operator and layer has an Example in its docstring, and it gives what it says."""

from __future__ import annotations

import doctest
import inspect
from typing import Any

import pytest

from dcn_d2 import layers, modeling, ops

PUBLIC = [(module, name) for module in (ops, layers) for name in module.__all__]
PUBLIC.append((modeling, "MinimumIoUMatcher"))


def problems(value: Any, name: str) -> str:
    """What is wrong with the Example of a function or class; "" if it has one and it is right."""
    found = doctest.DocTestFinder(recurse=False).find(value, name, globs={})
    if "\nExample:\n" not in inspect.cleandoc(value.__doc__ or "") or not any(test.examples for test in found):
        return f"{name} has no Example: section with lines that begin with >>>"
    said: list[str] = []
    for test in found:
        doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    return "".join(said)


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[f"{module.__name__}.{name}" for module, name in PUBLIC])
def test_examples_run(module: Any, name: str) -> None:
    assert problems(getattr(module, name), name) == ""


def test_missing_and_wrong_examples_are_noticed() -> None:
    def without() -> None:
        """Gives nothing."""

    def empty() -> None:
        """Gives nothing.

        Example:
            It has no line of Python.
        """

    def wrong() -> None:
        """Gives nothing.

        Example:
            >>> 1 + 1
            3
        """

    assert "has no Example" in problems(without, "without")
    assert "has no Example" in problems(empty, "empty")
    assert "Expected:\n    3\nGot:\n    2" in problems(wrong, "wrong")
