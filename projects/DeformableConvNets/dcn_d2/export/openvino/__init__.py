# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""OpenVINO's files: written through its frontend for PyTorch, and run on Intel's and other processors."""

from .session import Session
from .writer import write

__all__ = ["Session", "write"]
