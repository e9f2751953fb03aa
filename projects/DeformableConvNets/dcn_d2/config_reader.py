# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Reads a config's YAML files as data: no tag of theirs can run code, and every error names file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from detectron2.utils.file_io import PathManager
from fvcore.common.config import BASE_KEY

MAX_VALUES = 100_000  # of one file, aliases written out; Detectron2's default config has about 300
_PYTHON_TAG = "tag:yaml.org,2002:python/"


class ConfigError(ValueError):
    """A config cannot be read, or has values that it cannot have; the message names file or key, value and choices."""


class _DataLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also reads !!python/tuple: that is data too, and stands in many dumped configs."""


def _construct_tuple(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


_DataLoader.add_constructor(f"{_PYTHON_TAG}tuple", _construct_tuple)


def read_config_file(file: str, including: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads a YAML and the files that its _BASE_ names, as Detectron2 does, but safely.

    Files that Detectron2 has installed, such as Base-RetinaNet.yaml, may hold tags that run code: so does its code.

    Args:
        file: a path, or an address that Detectron2's PathManager knows.
        including: the files whose _BASE_ led here.

    Returns:
        The values of all files, and for each key ("MODEL.DEVICE") the file and line that set it.

    Raises:
        ConfigError: it cannot be read.
    """
    if file.endswith(".py"):
        raise ConfigError(f"{file} is a program (a lazy config of Detectron2), which would be run: give a YAML file")
    identity = PathManager.get_local_path(file) if "://" in file else str(Path(file).resolve())
    if identity in including:
        raise ConfigError(f"{including[-1]}: its _BASE_ {file} leads back to itself")
    values, lines = _read_one_file(file)
    origins = {key: f"{file}, line {line}" for key, line in lines.items()}
    bases = values.pop(BASE_KEY, [])
    origins.pop(BASE_KEY, None)
    merged: dict[str, Any] = {}
    merged_origins: dict[str, str] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not base:
            raise ConfigError(
                f"{file}, line {lines[BASE_KEY]}: _BASE_ must name a file, or a list of files, got {base!r}"
            )
        base_values, base_origins = read_config_file(_resolve(base, file), (*including, identity))
        _merge(base_values, base_origins, merged, merged_origins)
    _merge(values, origins, merged, merged_origins)
    return merged, merged_origins


def _resolve(base: str, file: str) -> str:
    """Gives the place of a _BASE_, by fvcore's rule: relative to the file that names it."""
    base = str(Path(base).expanduser()) if base.startswith("~") else base
    if base.startswith(("/", "https://", "http://")):
        return base
    return f"{file.rpartition('/')[0] or '.'}/{base}"


def _read_one_file(file: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Gives the values of one file, and the line of each key."""
    if not PathManager.isfile(file):
        raise ConfigError(f"Config file {file!r} {'is a folder' if PathManager.isdir(file) else 'does not exist'}")
    try:
        with PathManager.open(file, "r") as stream:
            text = stream.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no text file: {error}") from error
    loader: Any = None
    try:
        loader = (yaml.UnsafeLoader if _is_installed_by_detectron2(file) else _DataLoader)(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            found = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value", type(None): "nothing"}[type(node)]
            raise ConfigError(f"{file} holds {found}, and no KEY: VALUE lines")
        lines: dict[str, int] = {}
        _note_lines(node, (), file, lines, [MAX_VALUES], ())
        return loader.construct_document(node), lines
    except yaml.YAMLError as error:
        raise ConfigError(_explain(error, file)) from error
    except RecursionError as error:
        raise ConfigError(f"{file} is nested too deeply to be a config") from error
    except (AttributeError, TypeError, ValueError) as error:  # such as a date that does not exist
        raise error if isinstance(error, ConfigError) else ConfigError(f"{file} is no valid YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _is_installed_by_detectron2(file: str) -> bool:
    import detectron2.model_zoo

    return Path(detectron2.model_zoo.__file__).with_name("configs").resolve() in Path(file).resolve().parents


def _note_lines(
    node: yaml.Node, path: tuple[str, ...], file: str, lines: dict[str, int], left: list[int], above: tuple[int, ...]
) -> None:
    """Notes the line of each key, and refuses what PyYAML takes silently or never ends."""
    line = node.start_mark.line + 1
    left[0] -= 1
    if left[0] < 0:
        raise ConfigError(f"{file}, line {line}: its aliases grow to more than {MAX_VALUES} values")
    if id(node) in above:
        raise ConfigError(f"{file}, line {line}: {'.'.join(path)} contains itself")
    if node.tag.startswith(_PYTHON_TAG) and isinstance(node, yaml.MappingNode):
        return  # PyYAML refuses it, or it stands in a file of Detectron2
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _note_lines(child, path, file, lines, left, (*above, id(node)))
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, child in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == "tag:yaml.org,2002:merge":
            _note_lines(child, path, file, lines, left, (*above, id(node)))
            continue
        if key_node.tag != "tag:yaml.org,2002:str":
            raise ConfigError(
                f"{file}, line {line}: a key must be a name, got {getattr(key_node, 'value', key_node)!r}"
            )
        key = key_node.value
        full = ".".join((*path, key))
        if key in seen:
            raise ConfigError(
                f"{file}: {full} stands twice, in lines {seen[key]} and {line}; only the last would count"
            )
        seen[key] = line
        lines[full] = line
        _note_lines(child, (*path, key), file, lines, left, (*above, id(node)))


def _explain(error: yaml.YAMLError, file: str) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    place = f"{file}, line {mark.line + 1}" if mark is not None else file
    if _PYTHON_TAG in problem:
        tag = problem.split(_PYTHON_TAG)[1].split("'")[0]
        return f"{place}: the tag !!python/{tag} is refused, it could run code; write out the value that it stands for"
    if "'\\t'" in problem:
        problem = "a tab; YAML is indented with spaces"
    return f"{place}: no valid YAML: {' '.join(problem.split())}"


def _merge(values: dict[str, Any], origins: dict[str, str], into: dict[str, Any], into_origins: dict[str, str]) -> None:
    """Merges `values` into `into`, node by node."""
    _merge_nodes(values, into, (), origins, into_origins)
    into_origins.update(origins)


def _merge_nodes(
    values: dict[str, Any],
    into: dict[str, Any],
    path: tuple[str, ...],
    origins: dict[str, str],
    into_origins: dict[str, str],
) -> None:
    for key, value in values.items():
        full = ".".join((*path, key))
        if key in into and isinstance(into[key], dict) != isinstance(value, dict):
            one, other = ("keys below it", "a value")[:: 1 if isinstance(value, dict) else -1]
            raise ConfigError(f"{origins.get(full, full)}: {full} has {one}, but {other} in {into_origins.get(full)}")
        if isinstance(value, dict):
            # Into a node of its own: what an alias shares must not change in both places.
            _merge_nodes(value, into.setdefault(key, {}), (*path, key), origins, into_origins)
        else:
            into[key] = value
