# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Compares every row of the zoo with MMDetection: `python -m benchmarks.parity --help`; see tests/parity/README.md."""
