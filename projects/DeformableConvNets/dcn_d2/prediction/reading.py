# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Gives the predictor images and frames, and keeps in mind which they are until their results come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from .sources import Source
from .videos import VideoError, read_frames


class Item(NamedTuple):
    """An image or frame whose result is awaited, or the end of a video.

    Attributes:
        source: where it comes from.
        frame: its number in the video, None of an image.
        pixels: of a frame, (height, width, 3) of uint8 in BGR. The predictor reads images itself.
        length: at the end of a video, how many frames it has.
        error: why a video could not be read.
    """

    source: Source
    frame: int | None = None
    pixels: np.ndarray | None = None
    length: int | None = None
    error: str = ""

    def is_awaited(self) -> bool:
        """Whether the predictor gets it."""
        return self.length is None and not self.error


class Feed:
    """Iterates over what a predictor takes, and remembers what has been taken.

    Args:
        sources: images and videos.
        wanted: says for a video and the number of a frame whether it is needed.
    """

    def __init__(self, sources: Iterable[Source], wanted: Callable[[Source, int], bool]) -> None:
        self._sources, self._wanted = sources, wanted
        self._given: deque[Item] = deque()

    def __iter__(self) -> Iterator[str | np.ndarray]:
        for source in self._sources:
            for item in self._items_of(source):
                self._given.append(item)
                if item.is_awaited():
                    yield source.path if item.pixels is None else item.pixels

    def _items_of(self, source: Source) -> Iterator[Item]:
        if not source.video:
            yield Item(source)
            return
        try:
            for number, pixels in read_frames(source.path, lambda number: self._wanted(source, number)):
                yield Item(source, length=number) if pixels is None else Item(source, number, pixels)
        except (OSError, VideoError) as error:
            yield Item(source, error=str(error))

    def next_item(self) -> Item:
        """Gives the item of the next result."""
        return self._given.popleft()

    def without_result(self) -> Iterator[Item]:
        """Gives the ends of videos, and those that could not be read, that come before the next result."""
        while self._given and not self._given[0].is_awaited():
            yield self._given.popleft()
