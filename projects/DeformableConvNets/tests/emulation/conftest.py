# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The emulator, for all test files of this folder."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .emulator import COMPILED, GRADIENTS, GREEDY_WARP, ROUND_ROBIN, SANITIZED, compile_library, schema_of


@pytest.fixture(scope="session")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Compiles the library once, also where several processes run the tests."""
    if SANITIZED in os.environ:
        return os.environ[SANITIZED]
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open(folder / "emulation.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "emulated.so"
        return str(library if library.exists() else compile_library(library))


@pytest.fixture(scope="session")
def configure(library_path: str) -> Iterator[Any]:
    """Loads the library and defines its operators; gives the function that sets schedule and removed barrier."""
    library = torch.library.Library("dcn_d2_emulated", "DEF")
    for name in GRADIENTS:
        for suffix in ("", "_backward"):
            compiled = COMPILED.get(name + suffix, name + suffix)
            library.define(str(schema_of(compiled)).removeprefix("dcn_d2::"))
    library.define(str(schema_of("deform_conv2d")).removeprefix("dcn_d2::"))
    torch.ops.load_library(library_path)
    emulator = ctypes.CDLL(library_path)

    def configure(schedule: int, removed_barrier: int = 0, file: str = "") -> None:
        emulator.dcn_emulate_configure(schedule, removed_barrier, file.encode())

    yield configure
    library._destroy()


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Fills what torch allocates with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# Under the sanitizers one schedule is enough: both touch the same memory.
@pytest.fixture(params=[ROUND_ROBIN] if SANITIZED in os.environ else [ROUND_ROBIN, GREEDY_WARP])
def schedule(request: pytest.FixtureRequest, configure: Any) -> None:
    configure(request.param)


@pytest.fixture
def device(configure: Any, library_path: str) -> Iterator[Any]:
    """Sets the device that the entry points think of: capability, multiprocessors, bytes of shared memory."""
    emulator = ctypes.CDLL(library_path)
    yield emulator.dcn_emulate_device
    emulator.dcn_emulate_device(90, 4, 227 << 10)
