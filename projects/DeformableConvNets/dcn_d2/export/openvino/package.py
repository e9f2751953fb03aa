# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Imports OpenVINO, which is optional, and keeps it from sending statistics."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Keeps OpenVINO from sending statistics about its use.

    It sends some when it is imported and when it converts a model, and asks nobody, unless it runs in continuous
    integration. So that is what it is told. Later calls of it in the same process send nothing either.
    """
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


def import_openvino() -> Any:
    """Imports OpenVINO.

    Raises:
        ImportError: it is not installed.
    """
    try:
        with without_telemetry():
            import openvino
    except ImportError as error:
        raise ImportError(
            f"exported models in OpenVINO's format need openvino ({error}): pip install openvino"
        ) from error
    return openvino


@functools.cache
def get_core() -> Any:
    """Gives the one `openvino.Core` of this process, which lives as long as the process.

    Its CPU plugin replaces the stack on which the main thread handles signals, if there is one, as with Python's
    faulthandler, and puts the older one back at its end. Two cores that end in the order in which they began would put
    back a stack that is freed, and the next signal with a handler, such as that of a child's end, would crash the
    process.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    return import_openvino().Core()
