# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Tests; the folders mirror dcn_d2. A package, so that tests can share code: `from tests.ops.samples import ...`."""
