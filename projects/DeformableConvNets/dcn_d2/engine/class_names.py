# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The names of a model's classes: from its config, its data sets or its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from ..data.needs import read_needs


def class_names_of(cfg: CfgNode) -> list[str]:
    """Gives the names of the classes of a config's model; [] if neither it nor its training data say them.

    Data sets are not loaded: many know the names of their classes only once they are.
    """
    if names := list(cfg.DATASETS.get("CLASS_NAMES", ())):
        return names
    things = read_needs(cfg, train=True).things
    registered = [name for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if name in DatasetCatalog]
    name = find_data_set(registered, things[1]) if things else ""
    return list(MetadataCatalog.get(name).thing_classes) if name else []


def find_data_set(names: Iterable[str], classes: int) -> str:
    """Gives the first of these data sets that is known to have so many categories; "" if none is."""
    return next((name for name in names if len(_categories_of(name)) == classes), "")


def _categories_of(name: str) -> Sequence[str]:
    return MetadataCatalog.get(name).get("thing_classes", None) or ()


def metadata_of(cfg: CfgNode, names: Sequence[str]) -> Metadata:
    """Gives what a `Visualizer` needs to draw a model's output: that of its test data, with its own names of classes.

    Args:
        cfg: of the model.
        names: of its classes; [] if neither its config nor its weights say them.
    """
    registered = MetadataCatalog.get(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else Metadata()
    if not names or list(registered.get("thing_classes", None) or ()) == list(names):
        return registered
    kept = {key: registered.get(key) for key in ("keypoint_names", "keypoint_flip_map") if registered.get(key, None)}
    return Metadata(thing_classes=list(names), **kept)
