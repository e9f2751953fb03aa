# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Names and writes output files. Only what an earlier run has written here is ever overwritten."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, PngImagePlugin

from .files import write_atomically

SOFTWARE = "dcn_d2"  # the text "Software" in our PNG files


def unique_stems(names: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Gives a different stem for the output of each file: a.png, x/a.png, b/A.jpg give a, a_2, A_3.

    It is the file's own stem. If a file before it in the list has the same stem, also in other letter case, the first
    free number is added.
    """
    paths = [Path(name) for name in names]
    own = {path.stem.lower() for path in paths}
    taken: set[str] = set()
    numbers: dict[str, int] = {}  # the last one that was added to a stem: thousands of files may have the same
    stems = []
    for path in paths:
        stem, number = path.stem, numbers.get(path.stem.lower(), 1)
        while stem.lower() in taken or (stem != path.stem and stem.lower() in own):
            number += 1
            stem = f"{path.stem}_{number}"
        taken.add(stem.lower())
        numbers[path.stem.lower()] = number
        stems.append(stem)
    return stems


def plain_label(text: str) -> str:
    """Gives a text as Detectron2's drawing must get it: by itself, matplotlib takes what follows a $ for a formula."""
    return text.replace("$", r"\$")


def frame_name(stem: str, frame: int | None) -> str:
    """Gives the name for the output of an image, or of a frame of a video: these have a folder for each video.

    Args:
        stem: of the image or video, from `unique_stems`.
        frame: the number of the frame; None for an image.
    """
    return stem if frame is None else f"{stem}.frames/{frame:06d}"


def remove_pictures(folder: Path) -> None:
    """Removes the PNGs that dcn_d2 has written, also in folders below, and the folders that are empty then."""
    for path in folder.rglob("*.png"):
        if path.is_file() and not path.is_symlink() and _is_ours(path):
            path.unlink()
    for name, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # something is in it
            os.rmdir(name)


class PictureFolder:
    """A folder to write pictures into; it is made if it does not exist.

    A PNG that an earlier run has written may be replaced. All other files are kept, and so is what this run reads or
    has written.

    Args:
        folder: where the pictures go.
        inputs: files that this run reads.

    Raises:
        OSError: The folder cannot be made or written to, or it is a file.
    """

    def __init__(self, folder: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file; a folder for the pictures was expected")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise PermissionError(f"the folder {self.folder} may not be written to")
        self.kept = {os.path.realpath(path) for path in inputs}  # Path.resolve() fails at a link to itself

    def path_of(self, name: str) -> Path:
        """Gives the path of the picture ``name``.

        Raises:
            FileExistsError: A file is there that must not be replaced.
        """
        path = self.folder / name
        if os.path.realpath(path) in self.kept:
            raise FileExistsError(f"{path} is an input or output of this run already: choose another output folder")
        if os.path.lexists(path) and not _is_ours(path):
            raise FileExistsError(f"{path} exists, and dcn_d2 has not written it: choose another output folder")
        return path

    def write(self, name: str, picture: Image.Image) -> Path:
        """Writes a picture as a PNG, whole or not at all, and gives its path."""
        path = self.path_of(name)
        path.parent.mkdir(exist_ok=True)  # of the frames of a video
        text = PngImagePlugin.PngInfo()
        text.add_text("Software", SOFTWARE)
        with write_atomically(path) as file:
            picture.save(file, "PNG", pnginfo=text)
        self.kept.add(os.path.realpath(path))
        return path


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
