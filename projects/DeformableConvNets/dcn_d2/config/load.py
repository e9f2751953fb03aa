# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Reads a config from a file and from KEY VALUE pairs, and checks it."""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg

from .access import value_of
from .checks import find_problems, raise_problems
from .messages import ConfigError, nearest_key, shorten
from .reader import read_config_file
from .registration import add_dcn_config, register_own_data
from .table import RULES

# What yacs raises, and literal_eval, which it reads values with.
_ERRORS_OF_MERGING = (AssertionError, AttributeError, KeyError, MemoryError, RecursionError, TypeError, ValueError)


def load_config(config_file: str, opts: Sequence[Any] = (), check: bool = True) -> CfgNode:
    """Reads a config with dcn_d2's keys, and registers everything of dcn_d2 and its DATASETS.OWN with Detectron2.

    Files are read as data: a YAML file from a stranger cannot run code.

    Args:
        config_file: path of a YAML file; "" gives the defaults.
        opts: KEY VALUE pairs that override it.
        check: refuse values that cannot work, and values that contradict each other. With False, call
            `dcn_d2.config.check_config` when the config is complete.

    Raises:
        ConfigError: it names the file and line, or the key, with the value and what is allowed.
    """
    cfg = get_cfg()
    add_dcn_config(cfg)
    origins: dict[str, str] = {}
    if config_file:
        cfg, origins = _merge_file(cfg, str(Path(config_file).expanduser()) if config_file[0] == "~" else config_file)
    _merge_options(cfg, opts, origins)
    if check:
        raise_problems(
            [(key, f"{origins[key]}: {message}" if key in origins else message) for key, message in find_problems(cfg)]
        )
        register_own_data(cfg)
    return cfg


def _merge_file(cfg: CfgNode, file: str) -> tuple[CfgNode, dict[str, str]]:
    """Gives `cfg` with the values of a file, and the file and line of each of its keys."""
    values, origins = read_config_file(file)
    if "VERSION" in values and values["VERSION"] not in (1, 2):
        raise ConfigError(f"{origins['VERSION']}: VERSION must be 1 or 2, got {shorten(values['VERSION'])}")
    for key, value in values.items():
        if isinstance(cfg.get(key), CfgNode) and not isinstance(value, dict):
            raise ConfigError(f"{origins[key]}: {_explain(cfg, key, value)}")

    class DataNode(CfgNode):
        """Detectron2's node, whose `merge_from_file` takes what has been read as data."""

        @classmethod
        def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
            return values

    reader = DataNode(cfg)
    try:
        reader.merge_from_file(file)  # it also converts configs of older versions
    except _ERRORS_OF_MERGING as error:
        key = _key_in(error)
        message = _explain(cfg, key, value_of(values, key)) if key else f"a value cannot be read: {error}"
        raise ConfigError(f"{origins.get(key, file)}: {message}") from error
    return CfgNode(reader), origins


def _merge_options(cfg: CfgNode, opts: Sequence[Any], origins: dict[str, str]) -> None:
    """Merges KEY VALUE pairs into `cfg`, and removes their keys from `origins`: the file did not set the value."""
    if len(opts) % 2:
        raise ConfigError(f"KEY VALUE must come in pairs, got {' '.join(map(str, opts))}")
    absent = object()
    for key, value in zip(opts[::2], opts[1::2]):
        try:
            if value_of(cfg, str(key), absent) is absent:  # Detectron2 also looks for parts of a key inside values
                raise KeyError(key)
            cfg.merge_from_list([key, value])
        except _ERRORS_OF_MERGING as error:
            raise ConfigError(_explain(cfg, str(key), value)) from error
        origins.pop(key, None)


def _key_in(error: BaseException) -> str:
    """The key that a message of yacs names, or ""."""
    found = re.search(r"[Kk]ey:? ([A-Z][A-Za-z0-9_.]*)", str(error))
    return found[1] if found else ""


def _explain(cfg: CfgNode, key: str, value: Any) -> str:
    """Says why a value could not be merged."""
    absent = object()
    expected = value_of(cfg, key, absent)
    if expected is absent:
        return f"Non-existent key: {key}{nearest_key(key, cfg)}"
    if isinstance(expected, CfgNode):
        return f"Type mismatch: {key} is a node with the keys {', '.join(expected)}, not a value, got {shorten(value)}"
    decoded = value
    if isinstance(value, str):
        try:
            decoded = literal_eval(value)
        except _ERRORS_OF_MERGING + (SyntaxError,):
            decoded = value
    if isinstance(expected, float) and type(decoded) is int:
        return (
            f"Type mismatch: {key} must be written with a decimal point, {shorten(decoded)}.0, got {shorten(decoded)}"
        )
    if isinstance(expected, str) and not isinstance(decoded, str):
        return f"Type mismatch: {key} must be a string, got {shorten(decoded)} (quotes make it one: \"'{value}'\")"
    problem = RULES[key](decoded) if key in RULES else None
    if problem is None:
        problem = f"must be of type {type(expected).__name__}, for example {expected!r}"
    return f"Type mismatch: {key} {problem}, got {shorten(decoded)}"
