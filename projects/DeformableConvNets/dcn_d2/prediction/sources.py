# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Finds images and videos: files, folders, patterns, lists, COCO's files, addresses."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .manifests import MANIFESTS, Entry, read_coco, read_lines, read_manifest

IMAGES = frozenset(".bmp .dib .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split())
VIDEOS = frozenset(".avi .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .webm .wmv".split())
_ADDRESS = re.compile(r"\w[\w+.-]+://")
_FRAMES = 10**9  # a frame's image id is the number of its video times this, plus the number of the frame


class Source(NamedTuple):
    """An image or a video.

    Attributes:
        number: its place in the list, from 1.
        path: as given, or an address.
        image_id: of an image; `image_id_of` gives those of frames.
        video: whether it is a video.
    """

    number: int
    path: str
    image_id: int | str
    video: bool = False


def image_id_of(source: Source, frame: int | None) -> int | str:
    """Gives the id of an image, or of a frame of a video: its number counts from 0 in the whole video."""
    return source.image_id if frame is None else source.number * _FRAMES + frame


class Sources(NamedTuple):
    """All images and videos of a command.

    Attributes:
        items: in the order of the arguments; folders and patterns are sorted.
        categories: of a COCO file, as it has them; [] for other inputs.
    """

    items: list[Source]
    categories: list[dict[str, Any]]


def find_sources(inputs: Sequence[str], images: str | None = None, output: str = "") -> Sources:
    """Lists all images and videos.

    The id of an image is its number in this list, from 1, or the one that a COCO file gives it. A file that is named
    twice counts once.

    Args:
        inputs: paths of files and folders, patterns, lists, addresses; "-" reads paths from standard input.
        images: the folder at which relative paths in lists start; by default that of the list.
        output: a folder that is left out when it lies inside of an input.

    Raises:
        ValueError: There are none, or a list cannot be understood.
        OSError: A list cannot be read.
    """
    coco = [name for name in inputs if name.lower().endswith(".json") and os.path.isfile(name)]
    if coco and len(inputs) > 1:
        raise ValueError(f"--input: {coco[0]} has image ids of its own, so it must be the only input")
    if coco:
        entries, categories = read_coco(coco[0], images)
        items = [Source(i, e.path, i if e.image_id is None else e.image_id) for i, e in enumerate(entries, 1)]
    else:
        paths = _unique(entry.path for name in inputs for entry in _expand(name, images, output))
        items, categories = [Source(i, path, i, _is_video(path)) for i, path in enumerate(paths, 1)], []
    if not items:
        raise ValueError(f"--input: there are no images in {', '.join(inputs)}")
    if odd := [item.path for item in items if "\0" in item.path]:
        raise ValueError(f"--input: {odd[0]!r} cannot be the name of a file")
    _check_addresses(items)
    return Sources(items, categories)


def _is_video(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in VIDEOS


def _expand(name: str, images: str | None, output: str) -> Iterator[Entry]:
    """Gives the entries of one argument."""
    if name == "-":
        yield from read_lines(sys.stdin.buffer, images or "")
    elif _ADDRESS.match(name):
        yield Entry(name)
    elif os.path.isdir(name):
        yield from (Entry(path) for path in _walk(name, os.path.realpath(output) if output else ""))
    elif os.path.isfile(name) and os.path.splitext(name)[1].lower() in MANIFESTS:
        yield from read_manifest(name, images)
    elif not os.path.lexists(name) and glob.has_magic(name):
        found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        if not found:
            raise ValueError(f"--input: no file fits the pattern {name}")
        yield from (Entry(path) for path in found)
    elif not name:
        raise ValueError("--input: a path is empty")
    elif not os.path.lexists(name) and os.path.splitext(name)[1].lower() not in IMAGES | VIDEOS:
        raise ValueError(f"--input: there is no file or folder {name}")
    else:
        yield Entry(name)  # also if it does not exist: it is listed as unreadable


def _walk(folder: str, output: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Gives images and videos below a folder, sorted; without hidden ones, and without the folder `output`."""
    real = os.path.realpath(folder)
    if real == output or real in above:  # a link to a folder above would lead round in a circle
        return
    folders = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry.path):  # entry.is_dir() fails at a link to itself
            folders.append(entry.path)
        elif os.path.splitext(entry.name)[1].lower() in IMAGES | VIDEOS and (entry.is_symlink() or entry.is_file()):
            yield entry.path
    for path in folders:
        yield from _walk(path, output, above | {real})


def _unique(paths: Iterable[str]) -> list[str]:
    as_is = re.compile(rf"{_ADDRESS.pattern}|.*\0", re.DOTALL)
    return list({path if as_is.match(path) else os.path.realpath(path): path for path in paths}.values())


def _check_addresses(items: list[Source]) -> None:
    """Refuses addresses that Detectron2's PathManager has no handler for."""
    addresses = [item.path for item in items if _ADDRESS.match(item.path)]
    if not addresses:
        return
    from detectron2.utils.file_io import PathManager

    known = tuple(PathManager._path_handlers)
    for address in addresses:
        if not address.startswith(known):
            scheme = address.partition("://")[0]
            raise ValueError(
                f"--input: Detectron2's PathManager has no handler for {address}: copy the files to this machine, or "
                f"register a handler for {scheme}:// (iopath has one for s3://)"
            )
        if _is_video(address):
            raise ValueError(f"--input: {address} is a video: download it first")


def stems_of(items: Sequence[Source]) -> list[str]:
    """Gives a different name for the output of each image and video; see `dcn_d2.outputs.unique_stems`."""
    from ..outputs import unique_stems

    return unique_stems(Path(item.path).name for item in items)
