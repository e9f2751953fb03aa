# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Predicts what a shard has to do: reads ahead, makes batches of one size, writes what is found."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.structures import Instances
from PIL import Image

from ..data.images import ImageError
from ..outputs import PictureFolder, frame_name
from .draw import display_image, draw_detections
from .reading import Loaded
from .records import Categories, detections_of
from .sources import image_id_of

_BATCHES = 4  # images of so many batches wait until others of the same size come
_WAITING_BYTES = 512 << 20  # but not more than this
Predictor = Callable[[Any], Any]


def predict_batch(predictor: Predictor, images: Sequence[np.ndarray]) -> list[Instances | str]:
    """Gives the instances of each image, on the CPU, or why there are none.

    Args:
        predictor: a `DCNPredictor`, which takes a list of images.
        images: of one size.
    """
    if len(images) > 1:
        try:
            return [output["instances"].to("cpu") for output in predictor(list(images))]
        except ImageError:
            pass  # one of them cannot be predicted: find out which
    found: list[Instances | str] = []
    for image in images:
        try:
            found.append(predictor(image)["instances"].to("cpu"))
        except ImageError as error:
            found.append(str(error))
    return found


def batches(loaded: Iterable[Loaded], size: int) -> Iterator[list[Loaded]]:
    """Gathers images of one size; what could not be read, and ends of videos, come alone.

    Args:
        loaded: in any order.
        size: of a batch; there are smaller ones.
    """
    waiting: dict[tuple[int, ...], list[Loaded]] = {}
    number = weight = 0
    for item in loaded:
        if item.pixels is None:
            yield [item]
            continue
        batch = waiting.setdefault(item.pixels.shape, [])
        batch.append(item)
        number, weight = number + 1, weight + item.pixels.nbytes
        while len(batch) == size or number > _BATCHES * size or weight > _WAITING_BYTES:
            # The batch that is full, or else that of the size which has waited longest.
            full = batch if len(batch) == size else next(iter(waiting.values()))
            first = full[0].pixels
            assert first is not None
            number, weight = number - len(full), weight - len(full) * first.nbytes
            yield waiting.pop(first.shape)
            if full is batch:
                break
    yield from waiting.values()


class Painter(NamedTuple):
    """Draws images into a folder.

    Attributes:
        folder: where the pictures go.
        stems: their names, in the order of the sources.
        confidence: the lowest score that is drawn.
        names: of the classes.
    """

    folder: PictureFolder
    stems: list[str]
    confidence: float
    names: list[str]

    def draw(self, item: Loaded, found: Instances) -> None:
        """Draws an image with what was found in it."""
        assert item.pixels is not None
        drawn = draw_detections(display_image(item.pixels), found[found.scores >= self.confidence], self.names)
        name = frame_name(self.stems[item.source.number - 1], item.frame)
        self.folder.write(f"{name}.png", Image.fromarray(drawn))


def predict_all(
    loaded: Iterable[Loaded],
    predictor: Predictor,
    categories: Categories,
    batch_size: int,
    threshold: float = 0.0,
    painter: Painter | None = None,
) -> Generator[list[dict[str, Any]], None, None]:
    """Gives lines for `RunFolder.write`, those of one batch at a time.

    Args:
        loaded: what was read.
        predictor: see `predict_batch`.
        categories: of the model's classes.
        batch_size: images that are predicted together.
        threshold: lowest score that is written.
        painter: draws each image, if there is one.
    """
    drawn = 0
    for batch in batches(loaded, batch_size):
        pixels = [item.pixels for item in batch if item.pixels is not None]
        answers = predict_batch(predictor, pixels) if pixels else [batch[0].error]
        lines = []
        for item, found in zip(batch, answers, strict=True):
            if isinstance(found, str):
                lines.append(_error_line(item, found) if found else _end_line(item))
                continue
            found = found[found.scores >= threshold]
            lines.append(_image_line(item, found, categories))
            if painter is not None:
                painter.draw(item, found)
                drawn += 1
                if drawn % 50 == 0:
                    gc.collect()  # figures of matplotlib are rings of objects, large ones
        yield lines


def _line(item: Loaded, kind: str, **values: Any) -> dict[str, Any]:
    name = {"file_name": item.source.path}
    return {"number": item.source.number, "frame": item.frame, "kind": kind} | name | values


def _error_line(item: Loaded, error: str) -> dict[str, Any]:
    return _line(item, "error", error=error)


def _end_line(item: Loaded) -> dict[str, Any]:
    return _line(item, "end", length=item.frame)


def _image_line(item: Loaded, found: Instances, categories: Categories) -> dict[str, Any]:
    image_id = image_id_of(item.source, item.frame)
    height, width = found.image_size
    detections = detections_of(found, image_id, categories)
    return _line(item, "image", image_id=image_id, width=width, height=height, detections=detections)
