# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Makes lines for `RunFolder` of what the predictor finds."""

from __future__ import annotations

import gc
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from detectron2.structures import Instances
from PIL import Image

from ..data.images import ImageError, read_image
from ..engine import DCNPredictor, one_line
from ..outputs import PictureFolder, frame_name
from .draw import display_image, draw_detections
from .reading import Feed, Item
from .records import Categories, detections_of
from .sources import image_id_of

Line = dict[str, Any]


class Painter(NamedTuple):
    """Draws images into a folder.

    Attributes:
        folder: where the pictures go.
        stems: their names, in the order of the sources.
        confidence: the lowest score that is drawn.
        names: of the classes.
    """

    folder: PictureFolder
    stems: Sequence[str]
    confidence: float
    names: list[str]

    def draw(self, item: Item, found: Instances) -> None:
        """Draws an image with what was found in it."""
        pixels = read_image(item.source.path) if item.pixels is None else item.pixels
        drawn = draw_detections(display_image(pixels), found[found.scores >= self.confidence], self.names)
        name = frame_name(self.stems[item.source.number - 1], item.frame)
        self.folder.write(f"{name}.png", Image.fromarray(drawn))


def predict_all(
    feed: Feed,
    predictor: DCNPredictor,
    categories: Categories,
    threshold: float = 0.0,
    painter: Painter | None = None,
) -> Generator[Line, None, None]:
    """Gives a line for each image, and one for the end of each video.

    Args:
        feed: what is predicted.
        predictor: it reads images in the background, and makes batches of one size.
        categories: of the model's classes.
        threshold: lowest score that is written.
        painter: draws each image, if there is one.
    """
    for number, output in enumerate(predictor.stream(feed, return_errors=True), 1):
        yield from map(_line_without_result, feed.without_result())
        item = feed.next_item()
        if isinstance(output, BaseException):
            cause = output.__cause__ if isinstance(output.__cause__, ImageError) else output  # without a position
            yield _line(item, "error", error=one_line(cause))
            continue
        found = output["instances"].to("cpu")
        found = found[found.scores >= threshold]
        if painter is not None:
            painter.draw(item, found)
            if number % 50 == 0:
                gc.collect()  # figures of matplotlib are rings of objects, large ones
        yield _image_line(item, found, categories)
    yield from map(_line_without_result, feed.without_result())


def _line(item: Item, kind: str, **values: Any) -> Line:
    return {"number": item.source.number, "frame": item.frame, "kind": kind, "file_name": item.source.path} | values


def _line_without_result(item: Item) -> Line:
    return _line(item, "error", error=item.error) if item.error else _line(item, "end", length=item.length)


def _image_line(item: Item, found: Instances, categories: Categories) -> Line:
    image_id = image_id_of(item.source, item.frame)
    height, width = found.image_size
    detections = detections_of(found, image_id, categories)
    return _line(item, "image", image_id=image_id, width=width, height=height, detections=detections)
