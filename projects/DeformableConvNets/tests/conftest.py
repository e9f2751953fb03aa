# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

from __future__ import annotations

import os
import secrets
import zlib
from pathlib import Path

import hypothesis
import pytest

# In CI the same examples every time: a failure there must be reproducible and must not depend on luck. The first
# calls of an operator are slow, hence no deadline.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of a test's random numbers; pytest shows it where the test fails.

    It follows from the test's name, so that each run is like the last one. `DCN_TEST_SEED=random` draws another one for
    each test, and `DCN_TEST_SEED=1234` repeats such a test.
    """
    wanted = os.environ.get("DCN_TEST_SEED", "")
    number = zlib.crc32(request.node.nodeid.encode())
    if wanted:
        number = secrets.randbits(32) if wanted == "random" else int(wanted)
    print(f"DCN_TEST_SEED={number}")
    return number


@pytest.fixture(scope="session")
def project() -> Path:
    """The folder with setup.py, configs/ and csrc/."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository(project: Path) -> Path:
    """The root of the repository; skips where the project was copied out of it, as into detectron2/projects."""
    root = project.parent.parent
    if not (root / "Makefile").exists():
        pytest.skip("the project is used outside its repository")
    return root
