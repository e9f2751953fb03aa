# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A picture of some annotated samples, chosen so that they show what is in a data set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw

from ...outputs import plain_label
from ..annotations import Record
from ..findings import show
from ..images import read_image
from .columns import Columns
from .pixels import Look

logger = logging.getLogger(__name__)
SAMPLES = 9
COLUMNS = 3
SIDE, TITLE = 480, 20  # pixels of a sample, and of the line above it
_DRAWN = ("bbox", "bbox_mode", "category_id", "segmentation", "keypoints", "iscrowd")


def choose_samples(
    columns: Columns, looks: Sequence[Look | None], names: Sequence[str], number: int = SAMPLES
) -> dict[int, str]:
    """Chooses images that can be read: their indices, and why each was chosen."""
    readable = np.array([look is not None and not look.fault for look in looks])
    counts = np.where(readable, columns.counts(), 0)
    where = np.flatnonzero(columns.usable & readable[columns.image])
    chosen: dict[int, str] = {}
    if len(where):
        areas = columns.lengths[where].prod(1)
        image = columns.image[where]
        chosen[int(counts.argmax())] = f"most boxes: {counts.max()}"
        for position, why in ((areas.argmin(), "smallest box"), (areas.argmax(), "largest box")):
            chosen.setdefault(int(image[position]), why)
        categories, first = np.unique(columns.categories[where], return_index=True)
        seen = {*columns.categories[where][np.isin(image, list(chosen))].tolist()}
        for category, position in zip(categories.tolist(), first.tolist()):
            if category not in seen and len(chosen) < number:
                chosen.setdefault(int(image[position]), names[category] if category < len(names) else "")
    empty = np.flatnonzero(readable & (columns.counts() == 0))
    if len(empty) and len(chosen) < number:
        chosen[int(empty[0])] = "no objects"
    rest = [index for index in np.flatnonzero(readable).tolist() if index not in chosen]
    for index in rest[:: max(1, len(rest) // max(1, number - len(chosen)))][: number - len(chosen)]:
        chosen[index] = ""
    return dict(list(chosen.items())[:number])


def draw_samples(columns: Columns, looks: Sequence[Look | None], metadata: Any, path: Path) -> bool:
    """Draws samples into one picture; returns False if there is no image to draw."""
    tiles = []
    names = metadata.get("thing_classes", None) or ()
    metadata = Metadata(**metadata.as_dict() | {"thing_classes": [plain_label(name) for name in names]})
    for index, why in choose_samples(columns, looks, names).items():
        record = columns.records[index]
        try:
            tiles.append(_draw(_drawable(columns, index), metadata, why))
        except Exception as error:  # what is drawn may have any fault; it was told
            logger.info(f"{show(record['file_name'])} is not in the picture: {type(error).__name__}: {error}")
    if not tiles:
        return False
    rows = -(-len(tiles) // COLUMNS)
    picture = Image.new("RGB", (min(COLUMNS, len(tiles)) * SIDE, rows * (SIDE + TITLE)), "white")
    for number, tile in enumerate(tiles):
        picture.paste(tile, (number % COLUMNS * SIDE, number // COLUMNS * (SIDE + TITLE)))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return True


def _drawable(columns: Columns, index: int) -> Record:
    """The record of an image with the annotations that can be drawn."""
    with np.errstate(invalid="ignore"):
        good = (columns.lengths > 0).all(1) & (columns.categories >= 0)
    annotations = [columns.all[i] for i in np.flatnonzero(good & (columns.image == index)).tolist()]
    fields = [key for key in _DRAWN if all(annotation.get(key) is not None for annotation in annotations)]
    annotations = [{key: annotation[key] for key in fields} for annotation in annotations]
    return {"file_name": columns.records[index]["file_name"], "annotations": annotations}


def _draw(record: Record, metadata: Any, why: str) -> Image.Image:
    pixels = read_image(record["file_name"], "RGB")
    scale = SIDE / max(pixels.shape[:2])
    drawn = Visualizer(pixels, metadata, scale=scale).draw_dataset_dict(record).get_image()
    tile = Image.new("RGB", (SIDE, SIDE + TITLE), "white")
    picture = Image.fromarray(drawn)
    picture.thumbnail((SIDE, SIDE))
    tile.paste(picture, (0, TITLE))
    title = f"{Path(record['file_name']).name[-50:]}{f' ({why[:30]})' if why else ''}"
    ImageDraw.Draw(tile).text((4, 4), title.encode("ascii", "replace").decode(), fill="black")
    return tile
