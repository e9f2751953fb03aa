# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Registers the data sets of DATASETS.OWN. This opens no file, so a config also works where its data are not."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ..findings import show
from .categories import refuse_unknown

logger = logging.getLogger(__name__)


class OwnDataSet(NamedTuple):
    """One data set of DATASETS.OWN with what the config says about all of them; called, it loads itself."""

    name: str
    json_file: str
    image_root: str
    class_names: tuple[str, ...]
    keypoint_names: tuple[str, ...]
    keypoint_flip_map: tuple[tuple[str, str], ...]

    def __call__(self) -> list[dict[str, Any]]:
        """Loads it as `load_coco_json` does, but the number of a class is its place in `class_names`.

        Raises:
            ValueError: The file has objects of a category that is not in `class_names`.
        """
        metadata = MetadataCatalog.get(self.name)
        in_file = f"{self.name} by its file"
        MetadataCatalog.pop(in_file, None)
        try:
            records = load_coco_json(self.json_file, self.image_root, in_file)
            found = MetadataCatalog.get(in_file)
            names, ids = list(found.thing_classes), dict(found.thing_dataset_id_to_contiguous_id)
        finally:
            MetadataCatalog.pop(in_file, None)
        wanted = self.class_names or tuple(names)
        place = [wanted.index(name) if name in wanted else None for name in names]
        objects = [annotation for record in records for annotation in record["annotations"]]
        unknown = {index for annotation in objects if place[index := annotation["category_id"]] is None}
        refuse_unknown([names[index] for index in unknown], wanted, self.json_file)
        for annotation in objects:
            annotation["category_id"] = place[annotation["category_id"]]
        to_class = {key: place[index] for key, index in ids.items() if place[index] is not None}
        # COCO's evaluation wants an id for each class. It ignores those that are not in the file.
        lacking = [index for index in range(len(wanted)) if index not in to_class.values()]
        to_class |= {max(ids) + 1 + number: index for number, index in enumerate(lacking)}
        metadata.thing_classes = list(wanted)
        metadata.thing_dataset_id_to_contiguous_id = to_class
        return records


def data_set_name(json_file: str, image_root: str, class_names: Sequence[str]) -> str:
    """Gives a name for a data set: that of its file, and a digest, so that no other data set has the same name."""
    stem = re.sub(r"[^\w.-]+", "_", Path(json_file).stem)
    digest = hashlib.sha256(repr((json_file, image_root, tuple(class_names))).encode(errors="surrogateescape"))
    return f"{stem}_{digest.hexdigest()[:8]}"


def register_own_data(cfg: CfgNode) -> None:
    """Registers the data sets of DATASETS.OWN with Detectron2; a second call changes nothing.

    Args:
        cfg: of a run; a config without the keys of dcn_d2 has no such data sets.

    Raises:
        ValueError: One of their names is that of another data set.
    """
    data = cfg.DATASETS
    names, keypoints = tuple(data.get("CLASS_NAMES", ())), tuple(data.get("KEYPOINT_NAMES", ()))
    pairs = tuple((left, right) for left, right in data.get("KEYPOINT_FLIP_MAP", ()))
    for name, json_file, image_root in data.get("OWN", ()):
        register_data_set(OwnDataSet(name, json_file, image_root, names, keypoints, pairs))


def register_data_set(data_set: OwnDataSet) -> None:
    """Registers one data set of the user's own; a second call with the same changes nothing.

    Raises:
        ValueError: Its name is that of another data set.
    """
    if data_set.name in DatasetCatalog:
        known = DatasetCatalog[data_set.name]
        known = getattr(known, "function", known)  # behind what `check_data` has loaded
        if known == data_set:
            return
        other = f" ({show(known.json_file)})" if isinstance(known, OwnDataSet) else ""
        raise ValueError(
            f"DATASETS.OWN: the name {show(data_set.name)!r} is that of another data set{other}, or of the same with "
            "other DATASETS.CLASS_NAMES: choose another name"
        )
    DatasetCatalog.register(data_set.name, data_set)
    facts: dict[str, Any] = {"json_file": data_set.json_file, "image_root": data_set.image_root}
    facts |= {"evaluator_type": "coco", "own": True}
    if data_set.class_names:
        facts["thing_classes"] = list(data_set.class_names)
    if data_set.keypoint_names:
        facts["keypoint_names"] = list(data_set.keypoint_names)
        facts["keypoint_flip_map"] = list(data_set.keypoint_flip_map)
    MetadataCatalog.get(data_set.name).set(**facts)
