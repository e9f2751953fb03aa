# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Loads a data set for an inspection: entries with faults are told and left out, so that the rest can be looked at.

What is a fault is decided by the checks that a training makes. They stop at the first kind of fault that would keep the
data set from being loaded; here they are repeated until nothing of that kind is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..annotations import Record
from ..checks import COCO_EVALUATORS, load_data_set
from ..coco_json import check_coco_json, read_before, read_json
from ..findings import Fault, Findings, repeated
from ..needs import Needs
from ..records import check_records

Content = dict[str, Any]
LISTS = ("images", "annotations", "categories")
# Faults with which Detectron2's loader works all the same: they matter for COCO's evaluation.
_LOADABLE_PREFIX = "annotation-without-"
_LOADABLE = {"mask-empty", "mask-few-points", "annotation-id-0"}
_NOT_LOADABLE = {"annotation-without-id", "annotation-without-image", "annotation-without-category"}


class Loaded(NamedTuple):
    """A data set as far as it can be looked at."""

    records: list[Record]  # without images that have faults
    content: Content | None  # of its file in COCO's format, without entries that have faults; None for other data


def load(name: str, needs: Needs, findings: Findings) -> Loaded | None:
    """Loads a registered data set and notes what a training would find in it; None if it cannot be loaded at all."""
    metadata = MetadataCatalog.get(name)
    path, image_root = metadata.get("json_file", None), str(metadata.get("image_root", None) or "")
    content = None
    try:
        if path and metadata.get("evaluator_type", None) in COCO_EVALUATORS:
            file = PathManager.get_local_path(path)
            content = _clean(read_json(file), image_root, needs, findings)
            if content is None:
                return None
            with read_before(file, content):
                records = load_data_set(name, findings)
        else:
            records = load_data_set(name, findings)
    except (OSError, ValueError) as error:
        findings.note(str(error), kind="not-loaded")
        return None
    if not isinstance(records, Sequence):
        findings.note(
            f"it is a {type(records).__name__}, not a list: it cannot be inspected", kind="no-list", warn=True
        )
        return None
    return Loaded(_check_records(list(records), needs, metadata.get("thing_classes", None), findings), content)


def _clean(content: Any, image_root: str, needs: Needs, findings: Findings) -> Content | None:
    """Checks the content of a file in COCO's format, and gives what of it can be loaded; None for nothing."""
    seen: set[str] = set()
    while True:
        found = Findings(findings.subject)
        check_coco_json(content, image_root, needs, found)
        _take_new(found, seen, findings)
        faults = [fault for fault in found.faults if fault.severity == "error" and not _is_loadable(fault.kind)]
        if any(not fault.where for fault in faults):
            return None
        if not faults:
            return content
        content = _without(content, faults)


def _is_loadable(kind: str) -> bool:
    return kind in _LOADABLE or (kind.startswith(_LOADABLE_PREFIX) and kind not in _NOT_LOADABLE)


def _take_new(found: Findings, seen: set[str], findings: Findings) -> None:
    for fault in found.faults:
        if fault.kind not in seen:
            findings.take(fault)
    seen.update(fault.kind for fault in found.faults)


def _without(content: Content, faults: Iterable[Fault]) -> Content:
    """Gives the content without entries that have faults, and without annotations that this leaves alone."""
    drop: dict[str, set[int]] = {key: set() for key in LISTS}
    for fault in faults:
        key = next(key for key in LISTS if content.get(key) is fault.things)
        if fault.kind.endswith("duplicate-id"):  # the first of each may stay
            drop[key].update(fault.where[i] for i in repeated(fault.things[index]["id"] for index in fault.where))
        else:
            drop[key].update(fault.where)
    cleaned = dict(content)
    for key, indices in drop.items():
        if indices:
            cleaned[key] = [entry for index, entry in enumerate(content[key]) if index not in indices]
    for key, field in (("images", "image_id"), ("categories", "category_id")):
        lost = _ids(content[key][index] for index in drop[key]) - _ids(cleaned[key])
        if lost:
            kept = cleaned.get("annotations") or []
            cleaned["annotations"] = [a for a in kept if not _ids([a], field) & lost]
    return cleaned


def _ids(entries: Iterable[Any], field: str = "id") -> set[Any]:
    found = (entry.get(field) for entry in entries if isinstance(entry, dict))
    return {value for value in found if isinstance(value, (int, str))}


def _check_records(
    records: list[Record], needs: Needs, names: Sequence[str] | None, findings: Findings
) -> list[Record]:
    seen: set[str] = set()
    while True:
        found = Findings(findings.subject)
        check_records(records, needs, names, found)
        _take_new(found, seen, findings)
        faults = [fault for fault in found.faults if fault.things is records and fault.severity == "error"]
        faulty = {index for fault in faults for index in fault.where}
        if not faulty:
            return records
        records = [record for index, record in enumerate(records) if index not in faulty]
