# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Reads images and videos in background threads, a few ahead of the model."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ..data.images import read_image
from ..engine.errors import one_line
from .sources import Source
from .videos import read_frames

_FRAMES = 4  # of a video, so many frames are read at once


class Loaded(NamedTuple):
    """An image or frame that was read, or the end of a video.

    Attributes:
        source: where it comes from.
        frame: its number in the video, None of an image; at the end of a video, how many frames it has.
        pixels: (height, width, 3) of uint8 in BGR; None at the end of a video, or if it could not be read.
        error: why it could not be read; "" if it could.
    """

    source: Source
    frame: int | None = None
    pixels: np.ndarray | None = None
    error: str = ""


Task = Callable[[], list[Loaded]]


def read_ahead(
    sources: Iterable[Source], wanted: Callable[[Source, int], bool], threads: int = 2
) -> Generator[Loaded, None, None]:
    """Gives all images, and the wanted frames of videos, about in the order of `sources`.

    Besides what the caller holds, there are at most 2 images for each thread in memory.

    Args:
        sources: images and videos.
        wanted: says for a video and the number of a frame whether it is needed.
        threads: how many read at the same time.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
    waiting: deque[Future[list[Loaded]]] = deque()
    try:
        for task in _tasks(sources, wanted):
            waiting.append(pool.submit(task))
            if len(waiting) >= 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _tasks(sources: Iterable[Source], wanted: Callable[[Source, int], bool]) -> Iterator[Task]:
    for source in sources:
        if source.video:
            film = _Film(source, wanted)
            while not film.over:
                yield film.read_some
        else:
            yield lambda source=source: [_read(source)]  # type: ignore[misc]


def _read(source: Source) -> Loaded:
    try:
        return Loaded(source, None, read_image(source.path))
    except (OSError, ValueError) as error:
        return Loaded(source, error=one_line(error))
    except MemoryError:
        return Loaded(source, error=f"{source.path} is too large for the memory of this machine")


class _Film:
    """A video that is read a few frames at a time, by one thread at a time."""

    def __init__(self, source: Source, wanted: Callable[[Source, int], bool]) -> None:
        self.over = False
        self._source = source
        self._frames = read_frames(source.path, lambda number: wanted(source, number))
        self._lock = threading.Lock()

    def read_some(self) -> list[Loaded]:
        with self._lock:
            try:
                found = [Loaded(self._source, *frame) for frame in itertools.islice(self._frames, _FRAMES)]
                self.over = self.over or not found or found[-1].pixels is None
                return found
            except (OSError, ValueError) as error:
                self.over = True
                return [Loaded(self._source, error=one_line(error))]
