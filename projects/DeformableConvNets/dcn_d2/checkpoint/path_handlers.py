# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Addresses of foreign weights as values of MODEL.WEIGHTS, which are fetched, checked and converted.

The rest of Detectron2 sees the path of a file in Detectron2's own format, so its stock `DetectionCheckpointer`,
`DefaultPredictor` and `DefaultTrainer` work as they are.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import Detectron2Handler, PathHandler, PathManager
from iopath.common.file_io import get_cache_dir

from ..files import write_atomically
from . import download, mmdet, names, provenance, torchvision
from .download import locked, read_note, write_note
from .files import CorruptCheckpointError, check_digest, sha256_of
from .provenance import read_author, recognise, warn_of_v1
from .weights import convert_file

logger = logging.getLogger(__name__)

PREFIX = "mmdet:"
ROOT = "https://download.openmmlab.com/mmdetection/v2.0/"

# MMDetection's short names for the ImageNet weights that its models start from.
IMAGENET = {
    "torchvision://resnet50": "https://download.pytorch.org/models/resnet50-19c8e357.pth",
    "torchvision://resnet101": "https://download.pytorch.org/models/resnet101-5d3b4d8f.pth",
    "open-mmlab://resnext101_32x4d": "https://download.openmmlab.com/pretrain/third_party/resnext101_32x4d-a5af3160.pth",
}

# Published files that are converted at their plain addresses too; elsewhere "mmdet://" says what is to be converted.
PUBLISHERS = (
    *(
        f"{scheme}://download.openmmlab.com/{folder}/"
        for scheme in ("http", "https")
        for folder in ("mmdetection", "pretrain")
    ),
    *(f"https://download.pytorch.org/models/{name}" for name in ("resnet", "resnext")),
)


class ForeignWeightsHandler(PathHandler):
    """Resolves `mmdet://` followed by a path below MMDetection's download folder, an address, or a local file.

    Also resolves MMDetection's names of ImageNet weights, and plain addresses of what MMDetection and torchvision
    publish. The cache of Detectron2's downloads keeps the download, in "dcn_d2/downloads", and the converted file, in
    "dcn_d2". Each has about 170 MB for a row of the zoo. Either may be deleted at any time, and is made again.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX, *IMAGENET, *PUBLISHERS]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        source, downloaded = _fetch(path, force)
        if not path.startswith((PREFIX, *IMAGENET)) and not source.endswith((".pth", ".pt")):
            return source  # a log or a picture of the publisher
        check_digest(source)
        target = _cache_dir() / f"{Path(source).stem[-120:]}-{sha256_of(source)[:16]}-v{_version()}.pth"
        with locked(target, get_cache()):  # of several processes one converts, the others wait
            note = read_note(target)
            if force or not target.is_file() or note.get("sha256") != sha256_of(target):
                converted = _convert(source, downloaded)
                with write_atomically(target) as file:
                    torch.save(converted, file)
                note = {"sha256": sha256_of(target), "author": converted["__author__"]}
                write_note(target, note)
                logger.info(f"{source} converted to {target}")
        warn_of_v1(read_author(note.get("author")), source)
        return str(target)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if mode not in ("r", "rb"):
            raise ValueError(f"{path} can only be read, not opened with mode {mode!r}")
        return open(self._get_local_path(path, **kwargs), mode, buffering)


def register_path_handlers() -> None:
    """Makes Detectron2's PathManager resolve the addresses; a second call changes nothing.

    Detectron2's own checkpointer takes a foreign file without a prefix for one of its own. From then on it logs an
    error that says what the file is.
    """
    PathManager.register_handler(ForeignWeightsHandler())
    if not hasattr(DetectionCheckpointer._load_file, "tells_foreign_files"):
        DetectionCheckpointer._load_file = _telling_foreign_files(DetectionCheckpointer._load_file)


def _telling_foreign_files(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(original)
    def load_file(self: DetectionCheckpointer, filename: str) -> dict[str, Any]:
        loaded = original(self, filename)
        with contextlib.suppress(ValueError):  # a name is not text: Detectron2 will say so
            if not loaded.get("matching_heuristics") and recognise(loaded):
                logger.error(
                    f"{filename} has the names of MMDetection or torchvision, of which Detectron2 knows NONE: the "
                    f"model keeps its initial weights. Write {PREFIX}// before the path, and the file is converted: "
                    f"MODEL.WEIGHTS {PREFIX}//{os.path.abspath(filename)}"
                )
        return loaded

    load_file.tells_foreign_files = True  # type: ignore[attr-defined]
    return load_file


def find_weights(path: str, *, original: bool = False) -> str:
    """Gives the local file that a value of MODEL.WEIGHTS names: a path, or an address of any kind.

    Args:
        path: the value.
        original: gives a foreign file as it was published, and not what it is converted to.

    Raises:
        ValueError: The address is refused, or the file cannot be converted.
        OSError: The file does not exist, or cannot be fetched.
    """
    if os.path.isfile(path):
        return path
    foreign = path.startswith((PREFIX, *IMAGENET, *PUBLISHERS))
    if foreign and original:
        return _fetch(path, force=False)[0]
    if path.startswith((*download.SCHEMES, Detectron2Handler.PREFIX)) and not foreign:
        return fetch_weights(path)
    try:
        file = PathManager.get_local_path(path)
    except RuntimeError as error:  # of Detectron2's catalogue, and of handlers that cannot do it
        raise ValueError(f"{path} cannot be fetched: {error or type(error).__name__}") from error
    if not os.path.isfile(file):
        raise FileNotFoundError(f"there is {'only a folder' if os.path.isdir(file) else 'no file'} {file}")
    return file


def fetch_weights(address: str) -> str:
    """Gives the local copy of an address of http, https, ftp or detectron2://; see `download`.

    What Detectron2's own download has put into the cache from its zoo is used as it is.
    """
    if address.startswith(Detectron2Handler.PREFIX):
        name = address.removeprefix(Detectron2Handler.PREFIX)
        address = Detectron2Handler.S3_DETECTRON2_PREFIX + name
        download.file_name(address)
        kept = get_cache() / urlsplit(address).path.lstrip("/")
        if kept.is_file():
            return str(kept)
    return _download(address, address, force=False)[0]


def _fetch(path: str, force: bool) -> tuple[str, bool]:
    """Gives the local file for a path that the handler takes, and whether this call has just downloaded it."""
    # Detectron2's checkpointer passes a path through urlparse, which makes "mmdet:/file" of "mmdet:///file".
    place = path.removeprefix(PREFIX).removeprefix("//") if path.startswith(PREFIX) else path
    place = IMAGENET.get(place, place)
    if "\0" in place or place.startswith(PREFIX):
        raise ValueError(f"{path!r} is refused: it names neither a file nor an address")
    if "://" not in place:
        file = os.path.expanduser(place)
        if os.path.isfile(file):
            return file, False
        if os.path.isabs(file):
            raise FileNotFoundError(f"there is no file {file}, which {path} asks for")
        place = ROOT + place
    if place.startswith(download.SCHEMES):
        return _download(place, path, force)
    try:
        return PathManager.get_local_path(place, force=force), False
    except OSError as error:
        raise _unfetched(place, path, error) from error


def _download(place: str, path: str, force: bool) -> tuple[str, bool]:
    try:
        download.file_name(place)
    except ValueError as error:
        also = "" if "://" in path.removeprefix(f"{PREFIX}//") else f", and there is no such file in {os.getcwd()}"
        raise ValueError(f"{error}{also}") from None
    try:
        file, fresh = download.fetch(place, get_cache(), force)
    except OSError as error:
        raise _unfetched(place, path, error) from error
    return str(file), fresh


def _unfetched(place: str, path: str, error: OSError) -> OSError:
    file = f"/path/to/{place.rpartition('/')[2]}"
    if path.startswith((PREFIX, *IMAGENET, *PUBLISHERS)):  # it must be converted
        keys = f"MODEL.WEIGHTS {PREFIX}//{file}, or with --published PUBLISHED.WEIGHTS {file} (--from-published too)"
    else:
        keys = f"MODEL.WEIGHTS {file}"
    return OSError(
        f"{place} could not be fetched: {error}. Without a network, copy the file here by other means and give its "
        f"path: {keys}"
    )


def _convert(source: str, downloaded: bool) -> dict[str, Any]:
    """Reads and converts a file. If it is damaged and was just downloaded, it is deleted."""
    try:
        return convert_file(source)
    except CorruptCheckpointError as error:
        if not downloaded:
            raise
        Path(source).unlink(missing_ok=True)
        raise CorruptCheckpointError(f"{error}. It was deleted; the next attempt downloads it again") from error


def get_cache() -> Path:
    """The folder of Detectron2's downloads, which the variable FVCORE_CACHE may name."""
    return Path(get_cache_dir())


def _cache_dir() -> Path:
    return get_cache() / "dcn_d2"


def _version() -> str:
    """A digest of the code that converts: what an older version has converted is not used."""
    sources = (Path(str(file)) for file in (names.__file__, provenance.__file__, mmdet.__file__, torchvision.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]
