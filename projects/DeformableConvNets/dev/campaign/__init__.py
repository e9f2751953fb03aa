# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Long runs on random input; tests run a small part of each."""
