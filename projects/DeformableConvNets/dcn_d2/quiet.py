# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Silence for warnings that Detectron2 causes in PyTorch and that its users can do nothing about."""

from __future__ import annotations

import logging
import warnings


def silence_detectron2_warnings() -> None:
    """Ignores the deprecation warnings of Detectron2's code; scripts call it before they import Detectron2.

    Only scripts do: which warnings a program shows is for the program to decide, not for a library.
    """
    warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated")
    warnings.filterwarnings("ignore", message=".*torch.cuda.amp.GradScaler.* is deprecated")
    # Said through torch's log, once, when Detectron2 asks whether it is being traced.
    tracing = logging.getLogger("torch.fx._symbolic_trace")
    tracing.addFilter(lambda record: "is_fx_tracing" not in record.getMessage())
