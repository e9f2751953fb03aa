# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Addresses of foreign weights as values of MODEL.WEIGHTS: they are fetched, checked and converted on the way.

What the rest of Detectron2 sees is the path of a file in Detectron2's own format, so its stock `DetectionCheckpointer`,
`DefaultPredictor` and `DefaultTrainer` work as they are.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import IO, Any

import torch
from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import HTTPURLHandler, file_lock, get_cache_dir
from iopath.common.file_io import PathManager as PathManagerBase

from . import conversion, mmdet, torchvision
from .conversion import convert_checkpoint, warn_of_v1
from .reader import CorruptCheckpointError, digest_in_name, read_checkpoint, sha256_of, write_atomically

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

# Not Detectron2's PathManager, which would come back here for the publishers' addresses.
_downloads = PathManagerBase()
_downloads.register_handler(HTTPURLHandler())


class ForeignWeightsHandler(PathHandler):
    """Resolves `mmdet://` followed by a path below MMDetection's download folder, an address, or a local file.

    Also resolves MMDetection's names of ImageNet weights and plain addresses of what MMDetection and torchvision
    publish. Downloads and converted files are kept in the cache of Detectron2's downloads.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX, *IMAGENET, *PUBLISHERS]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        source, downloaded = _fetch(path, force)
        if not path.startswith((PREFIX, *IMAGENET)) and not source.endswith((".pth", ".pt")):
            return source  # a log or a picture of the publisher
        digest = _verify(source, downloaded)
        target = _cache_dir() / f"{Path(source).stem[:150]}-{digest[:16]}-{_version()}.pth"
        with file_lock(str(target)):  # of several processes one converts, the others wait
            converted = None if force else _read_converted(target)
            if converted is None:
                converted = _convert(source, downloaded)
                with write_atomically(target) as file:
                    torch.save(converted, file)
                logger.info(f"{source} converted to {target}")
        warn_of_v1(converted, source)
        return str(target)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if mode not in ("r", "rb"):
            raise ValueError(f"{path} can only be read, not opened with mode {mode!r}")
        return open(self._get_local_path(path, **kwargs), mode, buffering)


def register_path_handlers() -> None:
    """Makes Detectron2's PathManager resolve the addresses; a second call changes nothing."""
    PathManager.register_handler(ForeignWeightsHandler())


def _fetch(path: str, force: bool) -> tuple[str, bool]:
    """Local file for a path that the handler takes, and whether it is our download, which may be deleted."""
    # Detectron2's checkpointer passes a path through urlparse, which makes "mmdet:/file" of "mmdet:///file".
    place = path.removeprefix(PREFIX).removeprefix("//") if path.startswith(PREFIX) else path
    place = IMAGENET.get(place, place)
    if "://" not in place:
        file = os.path.expanduser(place)
        if os.path.isfile(file):
            return file, False
        if os.path.isabs(file):
            raise FileNotFoundError(f"there is no file {file}, which {path} asks for")
        place = ROOT + place
    manager = _downloads if place.startswith(("http://", "https://", "ftp://")) else PathManager
    try:
        return manager.get_local_path(place, force=force), manager is _downloads
    except OSError as error:
        raise OSError(
            f"{place} could not be fetched: {error}. Without a network, copy the file here by other means and give "
            f"its path: MODEL.WEIGHTS {PREFIX}///path/to/{place.rpartition('/')[2]}"
        ) from error


def _verify(source: str, downloaded: bool) -> str:
    """Digest of a file, which has to begin as the file's name says."""
    digest, expected = sha256_of(source), digest_in_name(os.path.basename(source))
    if expected is None or digest.startswith(expected):
        return digest
    if downloaded:
        Path(source).unlink(missing_ok=True)
        advice = "It is truncated or corrupted and was deleted; the next attempt downloads it again"
    else:
        advice = "It is truncated or corrupted; if it is another file on purpose, rename it"
    raise CorruptCheckpointError(
        f"{source}: its SHA-256 digest begins with {digest[:8]}, but with {expected} according to its name. {advice}"
    )


def _convert(source: str, downloaded: bool) -> dict[str, Any]:
    try:
        return convert_checkpoint(read_checkpoint(source), source)
    except CorruptCheckpointError as error:
        if not downloaded:
            raise
        Path(source).unlink(missing_ok=True)
        raise CorruptCheckpointError(f"{error}. It was deleted; the next attempt downloads it again") from error


def _read_converted(path: Path) -> dict[str, Any] | None:
    """Content of a converted file, whose tensors stay on disk; None if there is none or a part of it is missing."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError):
        return None


def _cache_dir() -> Path:
    return Path(get_cache_dir()) / "dcn_d2"


def _version() -> str:
    """Changes whenever the conversion does, so that files which an older one made are not used."""
    sources = (Path(str(file)) for file in (conversion.__file__, mmdet.__file__, torchvision.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]
