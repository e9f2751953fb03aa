# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Reads whole data sets and says what is wrong with them: `check` for files, `check_config_data` for a config."""

from .inspector import check, check_config_data
from .report import Finding, Report

__all__ = ["Finding", "Report", "check", "check_config_data"]
