# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The warnings that Detectron2 causes in other packages and that its users cannot do anything about."""

from __future__ import annotations

import logging
import warnings

# How the messages begin, as regular expressions. The tests ignore the same ones, see tests/conftest.py.
MESSAGES = (
    ".*torch.jit.script.* is deprecated",
    "torch.meshgrid. in an upcoming release",
    "pkg_resources is deprecated",
    ".*broadcast_buffers.* is deprecated",
    ".*torch.cuda.amp.GradScaler.* is deprecated",
    "__array__ implementation doesn't accept a copy keyword",  # pycocotools and Detectron2 with numpy 2
)


def silence_detectron2_warnings() -> None:
    """Ignores these warnings; scripts call it before they import Detectron2.

    The library does not call it: which warnings a program shows is for the program to decide.
    """
    for message in MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    # PyTorch logs this message once, when Detectron2 asks whether it is being traced.
    tracing = logging.getLogger("torch.fx._symbolic_trace")
    tracing.addFilter(lambda record: "is_fx_tracing" not in record.getMessage())
