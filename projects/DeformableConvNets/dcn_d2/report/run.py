# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A run as its report sees it: the files in OUTPUT_DIR, and its test sets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..config import load_config
from .history import Series, read_history
from .runs import Entry, describe_data_set, read_record, read_runs

RESULTS = "coco_instances_results.json"
LARGEST_COUNTED = 200_000_000  # bytes of an annotation file that is opened only to count


class Missing(Exception):  # noqa: N818  not an error: the report says it in the place of a part
    """What a part of the report needs is not there; the message says what."""


@dataclass
class SetResults:
    """What the evaluation of one test set has left: its folder, and where annotations and images are."""

    name: str
    folder: Path
    annotations: Path | None
    images: Path | None

    @property
    def title(self) -> str:
        """Its name, and the kind of evaluation if that is not the usual one."""
        kind = next((part for part in self.folder.parts[::-1] if part.startswith("inference")), "inference")
        return self.name + kind.removeprefix("inference").replace("_", " ")

    def read_results(self) -> list[dict[str, Any]]:
        """Reads the detections."""
        results = json.loads((self.folder / RESULTS).read_text())
        if not isinstance(results, list):
            raise Missing(f"{RESULTS} does not hold a list")
        return results

    def find_image(self, file_name: str) -> Path | None:
        """Gives the path of an image, if it is where the data set was."""
        folders = [self.images] if self.images else []
        if self.annotations:
            folders += [self.annotations.parent, self.annotations.with_suffix("")]
        return next((path for folder in folders if (path := folder / file_name).is_file()), None)


@dataclass
class Run:
    """The files of a run in `folder`."""

    folder: Path
    starts: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.starts = read_runs(self.folder)

    @cached_property
    def cfg(self) -> CfgNode:
        """The config that ran."""
        path = self.folder / "config.yaml"
        if not path.is_file():
            raise Missing("there is no config.yaml")
        return load_config(str(path), check=False)

    @cached_property
    def history(self) -> dict[str, Series]:
        """The scalars of metrics.json; {} where there are none."""
        try:
            return read_history(self.folder)
        except FileNotFoundError:
            return {}

    @property
    def trainings(self) -> list[Entry]:
        """The starts of training."""
        return [run for run in self.starts if run.get("status") != "evaluated"]

    @property
    def resumed_at(self) -> list[int]:
        """The iterations at which training was resumed."""
        return sorted({int(run["start"]) for run in self.trainings if run.get("start")})

    def data_set(self, name: str) -> Entry:
        """Says where a data set is: as the training noted it, or as it is registered here."""
        known = read_record(self.folder).get("data_sets")
        found = known.get(name) if isinstance(known, dict) else None
        if isinstance(found, dict) and found.get("annotations"):
            return found
        try:
            return describe_data_set(name)
        except Exception:  # a data set that is registered may be anywhere, and fail in any way
            return {}

    def test_sets(self) -> Iterator[SetResults]:
        """Gives the test sets that were evaluated as COCO does."""
        for path in sorted(self.folder.glob("inference*/**/" + RESULTS)):
            name = path.parent.name
            facts = self.data_set(name)
            converted = path.parent / f"{name}_coco_format.json"
            places = [Path(place) for place in (facts.get("annotations"), converted) if place]
            annotations = next((place for place in places if place.is_file()), None)
            images = Path(facts["images"]) if facts.get("images") else None
            yield SetResults(name, path.parent, annotations, images)


def count_annotations(path: str | None) -> tuple[str, str, str]:
    """Gives how many images, objects and classes an annotation file has, or why that is not known."""
    if not path or not os.path.isfile(path):
        return ("–", "–", "–") if not path else ("its annotation file is gone", "–", "–")
    if (size := os.path.getsize(path)) > LARGEST_COUNTED:
        return (f"not counted: the file has {size / 1e6:,.0f} MB", "–", "–")
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        counts = [f"{len(data[key]):,}" for key in ("images", "annotations", "categories")]
    except (OSError, ValueError, KeyError, TypeError):
        return ("its annotation file cannot be read", "–", "–")
    return counts[0], counts[1], counts[2]
