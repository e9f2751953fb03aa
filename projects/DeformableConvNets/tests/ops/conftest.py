# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the operators' tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def needs_gpu(item: pytest.Item) -> bool:
    """Whether one of a test's parameters is the device "cuda", or a case that runs there."""
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec else ()
    return any(value == "cuda" or getattr(value, "device", None) == "cuda" for value in values)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and needs_gpu(item):
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips all from one place: pytest's summary then has one line for each file, with the number of tests."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip(f"{item.path.name}: no GPU is visible to torch")


@pytest.fixture(autouse=True)
def random_numbers(seed: int) -> None:
    """What draws from torch's own generator draws the same alone as in a run of all tests."""
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    """On a GPU, torch rounds convolutions' float32 operands to TF32 by default, and so do the operators."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, value in zip(backends, before):
        backend.allow_tf32 = value


@pytest.fixture(autouse=True)
def errors_show_where_they_arise(request: pytest.FixtureRequest) -> Iterator[None]:
    """Waits for the GPU after every test. Once a kernel has faulted, nothing else can run in its process."""
    yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"{request.node.nodeid}: {error}", returncode=1)
