# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Small files in COCO's format: coloured squares on grey, each category in its colour."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLORS = {"cat": (230, 40, 40), "dog": (40, 230, 40), "bird": (40, 40, 230)}
CATEGORIES = [(1, "cat"), (5, "dog"), (9, "bird")]


def write_own(folder: Path, stem: str, categories: Sequence[tuple[int, str]] = CATEGORIES, images: int = 4) -> Path:
    """Writes `folder`/stem.json and its images; each image has one object of each category with a colour."""
    random = np.random.default_rng(len(stem) + images)
    (folder / "sub folder").mkdir(parents=True, exist_ok=True)
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, images + 1):
        pixels = np.full((64, 80, 3), 90, np.uint8)
        for key, name in categories:
            if name in COLORS:
                x, y, size = (int(value) for value in random.integers([2, 2, 14], [50, 40, 24]))
                pixels[y : y + size, x : x + size] = COLORS[name]
                annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": key, "iscrowd": 0}
                annotations.append(annotation | {"bbox": [x, y, size, size], "area": size**2})
        file_name = f"sub folder/{stem}_{number}.png"
        Image.fromarray(pixels).save(folder / file_name)
        listed.append({"id": number, "file_name": file_name, "height": 64, "width": 80})
    content = {"info": {}, "images": listed, "annotations": annotations}
    content["categories"] = [{"id": key, "name": name} for key, name in categories]
    (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder / f"{stem}.json"
