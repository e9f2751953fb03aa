# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import zlib
from pathlib import Path

import hypothesis
import pytest

from dcn_d2.quiet import MESSAGES

# In CI the same examples every time: a failure there must be reproducible and must not depend on luck. The first
# calls of an operator are slow, hence no deadline.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    """Ignores the warnings that the scripts ignore, and lets Ctrl-C reach the tests and their processes."""
    for message in MESSAGES:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")
    # A shell script starts its background jobs with SIGINT ignored, and their children inherit it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def files(repository: Path) -> list[Path]:
    """All files that are or would be committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"the files of the repository are asked from git, which says: {listed.stderr.strip()}")
    paths = [repository / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]
