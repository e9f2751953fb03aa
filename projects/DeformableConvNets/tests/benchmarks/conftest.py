# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the benchmarks change in the process is put back after each test; stand-ins for a GPU and a package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision

from benchmarks import deform_conv2d, failures, origin, peers

from .helpers import FakeGpu


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The benchmarks set the number of threads and the precision of the process, which other tests use too."""
    before = torch.get_num_threads()
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    flags = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield
    torch.set_num_threads(before)
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = flags


@pytest.fixture(autouse=True)
def _caches() -> None:
    """What the benchmarks find out or print once in a process, they do once in each test."""
    for function in (origin.commit, failures._print_once, peers.deformops):
        function.cache_clear()


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


@pytest.fixture
def convolutions_on_fake_gpu(fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark of convolutions with all that is done on a GPU, but tensors on the CPU."""

    class Layer(deform_conv2d.Layer):
        def __init__(self, shape: Any, device: str, dtype: torch.dtype) -> None:
            super().__init__(shape, "cpu", dtype)
            self.on_gpu = device == "cuda"

    monkeypatch.setattr(deform_conv2d, "Layer", Layer)
    return deform_conv2d


@pytest.fixture
def deformops(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands in for the package deformops; returns the arguments of its calls except the tensors."""
    calls = []

    def deform_conv2d(
        input: Any, offset: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, mask: Any
    ) -> torch.Tensor:
        calls.append((bias, stride, padding, dilation))
        return torchvision.ops.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)

    module = SimpleNamespace(deform_conv2d=deform_conv2d)
    for name in ("deformops", "deformops.integrations"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "deformops.integrations.torchvision", module)
    return calls
