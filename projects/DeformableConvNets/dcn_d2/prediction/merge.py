# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Makes the results of all shards into files: COCO's results, the table of images, what could not be read, videos.

The order is that of the inputs, however many shards there were. At no time more than one image's results are in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .run_folder import Done, Key, read_line


def merge(folder: Path, settings: dict[str, Any], done: Done, format: str) -> None:
    """Writes detections.json or .parquet, images.json and, if there is something to list, unreadable.txt.

    Args:
        folder: the output folder.
        settings: of its run.json.
        done: what all shards have written.
        format: "json", "parquet" or "both".
    """
    if format in ("json", "both"):
        with write_atomically(folder / "detections.json") as file:
            lines = (d for record in records_of(done) for d in record["detections"])
            for piece in _json_list(lines):
                file.write(piece)
    if format in ("parquet", "both"):
        from .parquet import write_parquet

        write_parquet(folder / "detections.parquet", records_of(done), settings["categories"])
    with write_atomically(folder / "images.json") as file:
        file.write(b'{"info": {"description": "predicted by dcn_d2"}, "annotations": [], "categories": ')
        file.write(json.dumps(settings["categories"]).encode() + b', "images": ')
        for piece in _json_list(image_of(record) for record in records_of(done)):
            file.write(piece)
        file.write(b"}\n")
    write_unreadable(folder, done)


def records_of(done: Done) -> Iterator[dict[str, Any]]:
    """Gives what was written about each image that was predicted, in the order of the inputs."""
    for key in sorted(done.images, key=_order):
        yield read_line(done.images[key])


def image_of(record: dict[str, Any]) -> dict[str, Any]:
    """Gives an image of images.json."""
    image = {"id": record["image_id"], **{key: record[key] for key in ("file_name", "width", "height")}}
    return image if record["frame"] is None else image | {"frame": record["frame"]}


def write_unreadable(folder: Path, done: Done) -> int:
    """Writes unreadable.txt, a line for each image with the reason, and gives the number of lines."""
    path = folder / "unreadable.txt"
    path.unlink(missing_ok=True)
    if not done.errors:
        return 0
    with write_atomically(path) as file:
        for key in sorted(done.errors, key=_order):
            line = describe_error(read_line(done.errors[key]))
            file.write(os.fsencode(line.replace("\n", " ")) + b"\n")
    return len(done.errors)


def describe_error(record: dict[str, Any]) -> str:
    """Says which image could not be read, and why; most reasons name the file themselves."""
    name, reason = record["file_name"], record["error"]
    return reason if name in reason else f"{name}: {reason}"


def _order(key: Key) -> tuple[int, int]:
    return key[0], -1 if key[1] is None else key[1]


def _json_list(values: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    """Gives a JSON list piece by piece, one value a line."""
    yield b"["
    for number, value in enumerate(values):
        yield (b",\n" if number else b"\n") + json.dumps(value).encode()
    yield b"]\n"
