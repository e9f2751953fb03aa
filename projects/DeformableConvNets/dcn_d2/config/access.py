# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Access to the values of a config by the full name of a key, for example "MODEL.DEVICE"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode


def value_of(cfg: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Gives the value of a key, or `default` if `cfg` does not have the key.

    Args:
        cfg: a config, or the dictionaries that a YAML file gives.
        key: the full name, "MODEL.DEVICE".
        default: for a key that is missing.
    """
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


def keys_of(cfg: CfgNode, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Gives the full names of all keys of `cfg` that hold a value and not further keys; `path` leads to `cfg`."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from keys_of(value, (*path, key))
        else:
            yield ".".join((*path, key))
