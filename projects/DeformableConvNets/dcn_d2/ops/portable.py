# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A switch for exporters: the operators are recorded as operators that other runtimes know, instead of our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_switched_on: ContextVar[bool] = ContextVar("portable_operators", default=False)


@contextmanager
def portable_operators() -> Iterator[None]:
    """Within it, the operators of dcn_d2 call operators that ONNX, TensorRT and OpenVINO know.

    A model that is traced or exported within it does not need dcn_d2 where it runs. Deformable convolution becomes
    `torchvision::deform_conv2d`. The RoI poolings become gathers and sums of PyTorch. Values are the same up to
    rounding, but PyTorch computes them more slowly. `torch.onnx.export` switches it on by itself.
    """
    token = _switched_on.set(True)
    try:
        yield
    finally:
        _switched_on.reset(token)


def are_portable() -> bool:
    """Whether the operators are to be recorded as those that other runtimes know."""
    return _switched_on.get() or torch.onnx.is_in_onnx_export()
