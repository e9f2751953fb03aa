# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Reads lists of images: text with one path a line, CSV, JSON lines, and COCO's annotation files."""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

MANIFESTS = (".txt", ".csv", ".jsonl", ".ndjson")
COLUMNS = ("file_name", "filename", "path", "image", "image_path", "file")
_ABSOLUTE = re.compile(r"/|\w[\w+.-]+://")


class Entry(NamedTuple):
    """An image of a list; it has an id if the list gives it one."""

    path: str
    image_id: int | str | None = None


def read_manifest(file: str, images: str | None) -> Iterator[Entry]:
    """Gives the images of a list, in its order.

    Args:
        file: its suffix says what it is.
        images: the folder at which relative paths start; by default that of the file.

    Raises:
        ValueError: It cannot be understood; the message names the file and the line.
    """
    root = os.path.dirname(file) if images is None else images
    suffix = os.path.splitext(file)[1].lower()
    with open(file, "rb") as stream:
        if stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{file} is text in UTF-16, which PowerShell's > writes: save it as UTF-8")
        if suffix == ".txt":
            yield from read_lines(stream, root)
            return
        lines = (_text(line) for line in stream)
        rows = _csv_rows(lines, file) if suffix == ".csv" else _json_rows(lines, file)
        for number, name in rows:
            if not name:
                raise ValueError(f"{file}, line {number}: the path is empty")
            yield Entry(_join(root, name))


def read_lines(stream: Iterable[bytes], root: str) -> Iterator[Entry]:
    """Gives the paths of a text, one a line; empty lines are left out. Names need not be valid text."""
    for line in stream:
        if name := _text(line).rstrip("\r\n"):
            yield Entry(_join(root, name))


def _text(line: bytes) -> str:
    return os.fsdecode(line.removeprefix(b"\xef\xbb\xbf"))  # the mark that Windows puts at the begin of a file


def _join(root: str, name: str) -> str:
    return name if not root or _ABSOLUTE.match(name) else os.path.join(root, name)


def _csv_rows(lines: Iterator[str], file: str) -> Iterator[tuple[int, str]]:
    reader = csv.DictReader(lines)
    column = _column(reader.fieldnames or (), file)
    for row in reader:
        yield reader.line_num, row[column] or ""


def _json_rows(lines: Iterator[str], file: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
        if isinstance(value, dict):
            value = value[_column(value, f"{file}, line {number}")]
        if not isinstance(value, str):
            raise ValueError(f"{file}, line {number}: a path was expected, got {str(value)[:80]}")
        yield number, value


def _column(names: Iterable[str], where: str) -> str:
    """Gives the column that holds paths."""
    names = list(names)
    for wanted in COLUMNS:
        for name in names:
            if name.strip().lower() == wanted:
                return name
    raise ValueError(f"{where}: no column is called {', '.join(COLUMNS)}; there are {', '.join(names) or 'none'}")


def read_coco(file: str, images: str | None) -> tuple[list[Entry], list[dict[str, Any]]]:
    """Reads images and categories of a file in COCO's format.

    Args:
        file: with the lists "images" and "categories"; annotations are not looked at.
        images: the folder of the images; by default that of the file.

    Raises:
        ValueError: It is not such a file, or ids are missing or occur twice.
    """
    from ..data.coco_json import read_json

    data = read_json(file)
    found = data.get("images") if isinstance(data, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"{file} is not a file in COCO's format: it has no list 'images'")
    root = os.path.dirname(file) if images is None else images
    entries, seen = [], set()
    for number, image in enumerate(found):
        name, key = (image.get("file_name"), image.get("id")) if isinstance(image, dict) else (None, None)
        if not isinstance(name, str) or not name or type(key) not in (int, str):
            raise ValueError(f"{file}: entry {number} of 'images' needs a 'file_name' and an 'id', it is {image!r:.99}")
        if key in seen:
            raise ValueError(f"{file}: two images have the id {key!r}")
        seen.add(key)
        entries.append(Entry(_join(root, name), key))
    categories = data.get("categories") or []
    for category in categories:
        if not isinstance(category, dict) or type(category.get("id")) is not int or "name" not in category:
            raise ValueError(f"{file}: a category needs an 'id' that is a number and a 'name', one is {category!r:.99}")
    return entries, categories
