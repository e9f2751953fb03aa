# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcn_d2.data import checks

from .sets import Sets


@pytest.fixture
def sets(tmp_path: Path) -> Iterator[Sets]:
    """Registers tiny data sets for the time of a test."""
    sets = Sets(tmp_path)
    yield sets
    sets.remove()
    checks._checked.clear()


@pytest.fixture
def panopticapi(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package panopticapi, or where it is not installed one that computes PQ anew: see stand_in/panopticapi."""
    if importlib.util.find_spec("panopticapi") is None:
        monkeypatch.syspath_prepend(str(Path(__file__).parent / "stand_in"))
