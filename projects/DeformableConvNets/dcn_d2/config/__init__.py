# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The config keys of dcn_d2, and reading a config with them."""

from .keys import add_dcn_config, add_dcn_keys, load_config, register, with_dcn_keys
from .reader import ConfigError

__all__ = ["ConfigError", "add_dcn_config", "add_dcn_keys", "load_config", "register", "with_dcn_keys"]
