# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Replaces a name in a module of another package for as long as one of its functions runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Makes `module.name` be `value` inside of a `with` block."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
