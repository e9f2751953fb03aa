# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Data sets: importing this package registers the embedded one, ``nuclei_train`` and ``nuclei_val``."""

from typing import TYPE_CHECKING, Any

from .checks import check_data, check_data_sets
from .nuclei import register_nuclei

if TYPE_CHECKING:
    from .inspection import check

__all__ = ["check", "check_data", "check_data_sets", "register_nuclei"]


def __getattr__(name: str) -> Any:
    if name != "check":  # which draws pictures, and so imports matplotlib
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .inspection import check

    return check


register_nuclei()
