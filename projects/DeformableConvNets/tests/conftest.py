# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

from __future__ import annotations

import os
import subprocess
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
    """Ignores the warnings that the scripts ignore."""
    for message in MESSAGES:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


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
