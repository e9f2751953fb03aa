# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Reads the YAML files of a config as data: their tags cannot run code, and every error names file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import yaml
from detectron2.utils.file_io import PathManager
from fvcore.common.config import BASE_KEY

from .messages import ConfigError

MAX_VALUES = 100_000  # of one file, with each alias counted in full; Detectron2's default config has about 300
_PYTHON_TAG = "tag:yaml.org,2002:python/"


class _DataLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also reads !!python/tuple: it is data too, and many dumped configs have it."""


def _construct_tuple(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


_DataLoader.add_constructor(f"{_PYTHON_TAG}tuple", _construct_tuple)


def read_config_file(file: str, including: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads a YAML and the files that its _BASE_ names, as Detectron2 does, but safely.

    Files that were installed with Detectron2, for example Base-RetinaNet.yaml, may hold tags that run code: whoever
    uses Detectron2 trusts it already.

    Args:
        file: a path, or an address that Detectron2's PathManager knows.
        including: the files that led here, each by its _BASE_.

    Returns:
        The values of all files, and for each key ("MODEL.DEVICE") the file and line that set it.

    Raises:
        ConfigError: a file cannot be read; the message names it.
    """
    if file.endswith(".py"):
        raise ConfigError(
            f"{file} is a program (a lazy config of Detectron2), and reading it would run it: give a YAML file"
        )
    identity = file if "://" in file else str(Path(file).resolve())
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
    if file.startswith(("https://", "http://")):
        return urljoin(file, base)  # it also resolves ".."
    return f"{file.rpartition('/')[0] or '.'}/{base}"


def _local_copy(file: str) -> str:
    """Gives the path of a file, which is fetched if it is an address of the web: iopath does that without time-out."""
    from iopath.common.file_io import get_cache_dir

    from ..checkpoint import download

    if not file.startswith(download.SCHEMES):
        return file
    try:
        return str(download.fetch(file, Path(get_cache_dir()))[0])
    except (OSError, ValueError) as error:
        raise ConfigError(f"Config file {file!r} could not be fetched: {error}") from error


def _read_one_file(file: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Gives the values of one file, and the line of each key."""
    local = _local_copy(file)
    if not PathManager.isfile(local):
        raise ConfigError(f"Config file {file!r} {'is a folder' if PathManager.isdir(local) else 'does not exist'}")
    try:
        with PathManager.open(local, "r") as stream:
            text = stream.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not a text file: {error}") from error
    loader: Any = None
    try:
        trusted = _is_installed_by_detectron2(file)
        loader = (yaml.UnsafeLoader if trusted else _DataLoader)(text)
        node, lines = loader.get_single_node(), _Lines(file, trusted)
        if node is not None:
            lines.note(node)
        if not isinstance(node, yaml.MappingNode):
            found = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value", type(None): "nothing"}[type(node)]
            raise ConfigError(f"{file} holds {found}, but lines KEY: VALUE were expected")
        return loader.construct_document(node), lines.of_keys
    except yaml.YAMLError as error:
        raise ConfigError(_explain(error, file)) from error
    except RecursionError as error:
        raise ConfigError(f"{file} is nested too deeply to be a config") from error
    except (AttributeError, TypeError, ValueError) as error:  # for example a date that does not exist
        raise error if isinstance(error, ConfigError) else ConfigError(f"{file} is not valid YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _is_installed_by_detectron2(file: str) -> bool:
    import detectron2.model_zoo

    return Path(detectron2.model_zoo.__file__).with_name("configs").resolve() in Path(file).resolve().parents


class _Lines:
    """Notes the line of each key of a file, and refuses keys that stand twice, endless values, and code.

    Args:
        file: for messages.
        trusted: tags that run code are allowed.
    """

    def __init__(self, file: str, trusted: bool) -> None:
        self.file, self.trusted = file, trusted
        self.of_keys: dict[str, int] = {}
        self._values = 0

    def note(self, node: yaml.Node, path: tuple[str, ...] = (), above: tuple[int, ...] = ()) -> None:
        """Notes the keys of a node and of all nodes below it.

        Args:
            node: as PyYAML parsed it.
            path: the keys that lead to it.
            above: the ids of the nodes that contain it.
        """
        place = f"{self.file}, line {node.start_mark.line + 1}"
        self._values += 1
        if self._values > MAX_VALUES:
            raise ConfigError(f"{place}: its aliases grow to more than {MAX_VALUES} values")
        if id(node) in above:
            raise ConfigError(f"{place}: {'.'.join(path)} contains itself")
        if node.tag.startswith(_PYTHON_TAG) and node.tag != f"{_PYTHON_TAG}tuple":
            if self.trusted:
                return
            tag = node.tag.removeprefix(_PYTHON_TAG)
            raise ConfigError(
                f"{place}: the tag !!python/{tag} is refused, because it could run code: write the value out"
            )
        if isinstance(node, yaml.SequenceNode):
            for child in node.value:
                self.note(child, path, (*above, id(node)))
        if isinstance(node, yaml.MappingNode):
            self._note_mapping(node, path, (*above, id(node)))

    def _note_mapping(self, node: yaml.MappingNode, path: tuple[str, ...], above: tuple[int, ...]) -> None:
        seen: dict[str, int] = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                self.note(child, path, above)
                continue
            if key_node.tag != "tag:yaml.org,2002:str":
                self.note(key_node, path, above)  # its message is better if the key is code
                raise ConfigError(f"{self.file}, line {line}: a key must be a name, got {key_node.value!r}")
            key = key_node.value
            full = ".".join((*path, key))
            if key in seen:
                raise ConfigError(
                    f"{self.file}: {full} stands twice, in lines {seen[key]} and {line}; only the last would count"
                )
            seen[key] = self.of_keys[full] = line
            self.note(child, (*path, key), above)


def _explain(error: yaml.YAMLError, file: str) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    place = f"{file}, line {mark.line + 1}" if mark is not None else file
    if "'\\t'" in problem:
        problem = "a tab; YAML is indented with spaces"
    return f"{place}: not valid YAML: {' '.join(problem.split())}"


def _merge(values: dict[str, Any], origins: dict[str, str], into: dict[str, Any], into_origins: dict[str, str]) -> None:
    """Merges the values of a file, and where they stand, into those of the files that were read before."""
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
            # The node must be a new one: an alias may share the old one, which would then change in both places.
            _merge_nodes(value, into.setdefault(key, {}), (*path, key), origins, into_origins)
        else:
            into[key] = value
