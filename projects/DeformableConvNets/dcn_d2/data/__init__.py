# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Data sets: importing this package registers the embedded one, ``nuclei_train`` and ``nuclei_val``."""

from .checks import check_data, check_data_sets
from .nuclei import register_nuclei

__all__ = ["check_data", "check_data_sets", "register_nuclei"]

register_nuclei()
