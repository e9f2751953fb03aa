# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Tools for whoever works on the project; a package, so that tests can import them."""
