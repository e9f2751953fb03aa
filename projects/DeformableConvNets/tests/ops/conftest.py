# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the operators' tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


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
