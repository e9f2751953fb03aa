# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The config keys of dcn_d2, and everything about reading and checking a config.

- `keys`: the keys and their defaults, with a sentence about each. `registration`: what makes Detectron2 know dcn_d2.
- `load`: a config from a file and KEY VALUE pairs. `reader`: YAML files as data.
- `table`: what each key may be. `rules`: what the table is made of. `checks`: whether a config can work.
- `access`, `messages`: what all of them use.
"""

from .checks import check_config
from .keys import add_dcn_keys, with_dcn_keys
from .load import load_config
from .messages import ConfigError
from .registration import add_dcn_config, register

__all__ = [
    "ConfigError",
    "add_dcn_config",
    "add_dcn_keys",
    "check_config",
    "load_config",
    "register",
    "with_dcn_keys",
]
