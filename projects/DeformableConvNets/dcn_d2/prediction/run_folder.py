# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The output folder of a prediction: which command it belongs to, and what is done.

    OUTPUT/run.json               the command: config, weights, inputs
    OUTPUT/parts/1-of-2/images.jsonl   what shard 1/2 has found, a line for each image, written while it runs
    OUTPUT/detections.json, images.json, unreadable.txt, pictures/   the results, see `merge`

A line that a kill has cut off is dropped. Everything else that is written stays, and is not computed again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple
from uuid import uuid4

from ..engine.folder import check_unlocked, lock_folder, unlock_folder
from ..files import write_atomically
from ..outputs import remove_pictures
from .shards import Shard

RUN, PARTS, PART, PICTURES = "run.json", "parts", "images.jsonl", "pictures"
RESULTS = ("detections.json", "detections.parquet", "images.json", "unreadable.txt")
_SYNC_EVERY = 10.0  # seconds, after which what was written is also safe from a power failure
_HEAD = re.compile(rb'\{"number": (\d+), "frame": (null|\d+), "kind": "(image|error|end)"')

Key = tuple[int, int | None]  # number of a source, and of a frame of a video


class Place(NamedTuple):
    """Where a line stands."""

    file: str
    offset: int


class Done(NamedTuple):
    """What all shards have written so far.

    Attributes:
        images: the images and frames that were predicted.
        errors: those that could not be read, and not predicted by another try either.
        lengths: the number of frames of videos that were read to their end.
    """

    images: dict[Key, Place]
    errors: dict[Key, Place]
    lengths: dict[int, int]


def read_done(folder: Path) -> Done:
    """Reads what is done; whole lines only, so other shards may be writing."""
    done = Done({}, {}, {})
    for file in sorted(folder.glob(f"{PARTS}/*/{PART}")):
        _read_part(file, done)
    for key in done.images:
        done.errors.pop(key, None)
    return done


def _read_part(file: Path, done: Done) -> int:
    """Adds the lines of a file to `done`, and gives the number of bytes up to the end of the last whole one."""
    offset = 0
    with open(file, "rb") as stream:
        for line in stream:
            head = _HEAD.match(line)
            if not head or not line.endswith(b"}\n"):  # a kill or a power failure has cut it off
                break
            number, frame = int(head[1]), None if head[2] == b"null" else int(head[2])
            if head[3] == b"end":
                done.lengths[number] = json.loads(line)["length"]
            else:
                (done.images if head[3] == b"image" else done.errors)[number, frame] = Place(str(file), offset)
            offset += len(line)
    return offset


def read_line(place: Place) -> dict[str, Any]:
    """Reads what was written about an image."""
    with open(place.file, "rb") as stream:
        stream.seek(place.offset)
        return json.loads(stream.readline())


def count_missing(settings: dict[str, Any], done: Done) -> int:
    """Counts images and frames that no shard has done; a video that was not read to its end counts as one."""
    videos, every, missing = settings["videos"], settings["frames"], 0
    missing += len(set(range(1, settings["inputs"] + 1)) - set(videos) - {n for n, _ in done.images | done.errors})
    for video in videos:
        if video in done.lengths:
            frames = range(0, done.lengths[video], every)
            missing += sum((video, i) not in done.images and (video, i) not in done.errors for i in frames)
        elif (video, None) not in done.errors:
            missing += 1
    return missing


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads run.json.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not one of ours.
    """
    path = folder / RUN
    if not path.is_file():
        raise FileNotFoundError(f"--output {folder} holds no {RUN}: no prediction was started there")
    try:
        settings = json.loads(path.read_bytes())
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or not {"inputs", "videos", "frames", "categories"} <= set(settings):
        raise ValueError(f"{path} was not written by predict.py; name another --output")
    return settings


class RunFolder:
    """The output folder, in which one shard writes.

    Use it as a context: inside, no other process can run the same shard.

    Args:
        folder: it is made if needed.
        shard: of this process.
        settings: what makes the command; a folder with other settings is refused.
        overwrite: throws away what is there. One of several shards does so only if the settings are others.

    Raises:
        FileExistsError: The folder belongs to another command, or holds files of other origin.
        BlockingIOError: The same shard runs there now.
    """

    def __init__(self, folder: str, shard: Shard, settings: dict[str, Any], overwrite: bool = False) -> None:
        self.folder = Path(folder)
        self.settings = settings
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"--output {folder} is a file; a folder for the results was expected")
        self.folder.mkdir(parents=True, exist_ok=True)
        cleared = False
        if overwrite and (self.folder / RUN).exists():
            same = read_settings(self.folder) == json.loads(json.dumps(settings))  # refuses a run.json of others
            if cleared := shard.total == 1 or not same:
                self._remove_run()
        self._claim(cleared)
        self._part = self.folder / PARTS / f"{shard.number}-of-{shard.total}"
        self._file: IO[bytes] | None = None
        self._synced = time.monotonic()

    def _claim(self, cleared: bool) -> None:
        """Writes run.json, or compares it with this command; of several shards that start now, one writes it.

        Args:
            cleared: an earlier run was removed. What is left in the folder of pictures then stays there.
        """
        path = self.folder / RUN
        if not path.exists():
            names = (*RESULTS, PARTS) if cleared else (*RESULTS, PARTS, PICTURES)
            foreign = [name for name in names if (self.folder / name).exists()]
            if foreign and not path.exists():  # another shard may have started since
                raise FileExistsError(
                    f"{self.folder / foreign[0]} exists, and predict.py has not written it: name another --output"
                )
            own = self.folder / f".{RUN}.{uuid4().hex}.part"  # another machine may have the same process id
            try:
                with write_atomically(own) as file:
                    file.write(json.dumps(self.settings, indent=1).encode())
                os.link(own, path)  # fails if another shard was faster
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                os.replace(own, path)
            finally:
                own.unlink(missing_ok=True)
        earlier = read_settings(self.folder)
        if earlier != json.loads(json.dumps(self.settings)):
            raise FileExistsError(
                f"--output {self.folder} holds the results of another command ({_describe(earlier, self.settings)}): "
                "name another folder, or throw them away by --overwrite"
            )

    def _remove_run(self) -> None:
        for part in (self.folder / PARTS).glob("*"):
            try:
                check_unlocked(str(part))
            except BlockingIOError:
                raise BlockingIOError(f"--overwrite: a prediction runs in {self.folder} now") from None
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        for name in RESULTS:
            (self.folder / name).unlink(missing_ok=True)
        remove_pictures(self.folder / PICTURES)
        (self.folder / RUN).unlink()  # last, so that a kill before this leaves a folder of ours

    def __enter__(self) -> RunFolder:
        try:
            lock_folder(str(self._part))
        except BlockingIOError:
            text = f"--output {self.folder}: another process predicts the same part ({self._part.name}) there now"
            raise BlockingIOError(text) from None
        path = self._part / PART
        path.touch()
        whole = _read_part(path, Done({}, {}, {}))
        self._file = open(path, "r+b")  # noqa: SIM115 closed by __exit__
        self._file.truncate(whole)
        self._file.seek(whole)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        assert self._file is not None
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
            unlock_folder(str(self._part))

    def write(self, line: dict[str, Any]) -> None:
        """Writes a line in one piece: it stays when the process is killed.

        Args:
            line: it begins with "number", "frame" and "kind": image, error or end (of a video).
        """
        assert self._file is not None
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced > _SYNC_EVERY:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()


def _describe(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """Says in what two commands differ."""
    changes = []
    for key in sorted(earlier.keys() | now.keys()):
        old, new = earlier.get(key), json.loads(json.dumps(now.get(key)))
        if old == new:
            continue
        if key == "config" and isinstance(old, dict):
            keys = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
            changes += [f"{name} was {old.get(name)}, is {new.get(name)}" for name in keys]
        elif key in ("inputs_sha256", "weights_sha256"):
            changes.append("other inputs" if key == "inputs_sha256" else "other weights")
        elif not isinstance(old, (list, dict)):
            changes.append(f"{key} was {old}, is {new}")
    return "; ".join(changes[:3]) + ("; …" if len(changes) > 3 else "")
