# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Divides images among shards. A shard knows its part without asking the others."""

from __future__ import annotations

from typing import NamedTuple

from .sources import Source


class Shard(NamedTuple):
    """The `number`-th of `total` parts, from 1.

    Images are dealt like cards, so that parts differ by one image at most, and so are the frames of a video. Together
    the shards have each image once.
    """

    number: int = 1
    total: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    def has_image(self, source: Source) -> bool:
        """Whether an image belongs to this shard."""
        return (source.number - 1) % self.total == self.number - 1

    def has_frame(self, frame: int, every: int) -> bool:
        """Whether this shard takes a frame of any video, of which every `every`-th one is predicted."""
        return frame % every == 0 and frame // every % self.total == self.number - 1
