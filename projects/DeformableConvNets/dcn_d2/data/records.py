# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Checks a loaded data set: the list of dicts that `DatasetCatalog.get` gives."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence

from .annotations import Record, check_annotations, is_number, name_image
from .findings import Findings, shorten
from .needs import Needs


def check_records(records: Sequence[Record], needs: Needs, names: Sequence[str] | None, findings: Findings) -> None:
    """Checks a data set in Detectron2's format; see `Findings` for where the result goes.

    Args:
        records: one dict for each image.
        needs: what they are for.
        names: the categories; None where the data set does not say.
        findings: what is found.
    """
    if not len(records):
        findings.note("it has no images", kind="no-images")
        return
    strange = [index for index, record in enumerate(records) if not isinstance(record, dict)]
    if findings.count(
        strange, records, "images are not dicts", lambda i: f"[{i}] is {shorten(records[i])}", kind="entry-not-dict"
    ):
        return
    if _check_images(records, needs, findings) and needs.annotations:
        check_annotations(records, needs, names, findings)
        if needs.train and not findings.errors:
            _check_what_is_left(records, needs, findings)


def _check_images(records: Sequence[Record], needs: Needs, findings: Findings) -> bool:
    """Checks all but annotations; returns True if they can be looked at."""

    def report(where: Iterable[int], what: str, kind: str, then: str = "") -> bool:
        return findings.count(where, records, what, lambda index: name_image(records[index]), kind=kind, then=then)

    nameless = [i for i, record in enumerate(records) if not isinstance(record.get("file_name"), (str, os.PathLike))]
    usable = not report(nameless, "images have no 'file_name'", "image-without-file-name")
    if needs.evaluator:
        for key in needs.reads.fields:
            missing = [index for index, record in enumerate(records) if record.get(key) is None]
            usable &= not report(missing, f"images have no '{key}', which evaluation needs", f"image-without-{key}")
        if usable and "image_id" in needs.reads.fields:
            identities = Counter(str(record["image_id"]) for record in records)
            twice = [i for i, record in enumerate(records) if identities[str(record["image_id"])] > 1]
            report(twice, "images share their 'image_id' with another", "image-duplicate-id")
    if needs.train and any(field == "stuff_classes" for _, _, field in needs.classes):
        unlabelled = [index for index, record in enumerate(records) if not record.get("sem_seg_file_name")]
        what = "images have no 'sem_seg_file_name', which a model with a SEM_SEG_HEAD trains with"
        report(unlabelled, what, "image-without-labels")
    bad = [i for i, record in enumerate(records) if not (_is_size(record, "width") and _is_size(record, "height"))]
    usable &= not report(bad, "images have a 'width' or 'height' that is not a number above 0", "image-size-field")
    without = [i for i, record in enumerate(records) if not isinstance(record.get("annotations"), (list, tuple))]
    if not needs.annotations or not needs.train and len(without) == len(records):
        return usable
    return usable and not report(
        without,
        "images have no list 'annotations'",
        "image-without-annotation-list",
        then="An image without objects has an empty one",
    )


def _is_size(record: Record, key: str) -> bool:
    value = record.get(key)
    return value is None or (is_number(value) and value > 0)


def _check_what_is_left(records: Sequence[Record], needs: Needs, findings: Findings) -> None:
    """Checks that the filters of Detectron2's loader leave images to learn from."""
    left: Sequence[Record] = records
    why = []
    if needs.drops_empty:
        left = [record for record in left if any(not a.get("iscrowd", 0) for a in record["annotations"])]
        why.append("that have objects (DATALOADER.FILTER_EMPTY_ANNOTATIONS)")
    if needs.min_keypoints:
        key = "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE"
        left = [record for record in left if _count_visible(record) >= needs.min_keypoints]
        why.append(f"that have {needs.min_keypoints} visible keypoints ({key})")
    if not left:
        which = f", but the training takes only those {' and '.join(why)}" if why else ""
        findings.note(f"none of its {len(records)} images is left{which}", kind="nothing-left")


def _count_visible(record: Record) -> int:
    points = (annotation.get("keypoints") or () for annotation in record["annotations"])
    return sum(1 for values in points for visibility in values[2::3] if visibility > 0)
