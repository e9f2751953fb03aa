# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Checks annotation files in COCO's format: what makes Detectron2's loader or COCO's evaluation stop or ignore data.

Such files may come from strangers. Nothing here opens a file that they name.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pycocotools.coco

from .findings import Findings, shorten
from .needs import Needs

_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}


def read_json(path: str) -> Any:
    """Reads a JSON file as pycocotools does.

    Raises:
        ValueError: It is not JSON; the message names the file and says what is wrong with it.
    """
    size = os.path.getsize(path)
    try:
        with open(path) as file:  # in the system's encoding, as pycocotools
            text = file.read()
        if not text or text.isspace():
            raise ValueError(f"{path} is empty ({size} bytes)")
        if text.startswith("\ufeff"):
            raise ValueError(f"{path} begins with a byte order mark (BOM): save it as UTF-8 without one")
        return json.loads(text)
    except json.JSONDecodeError as error:
        end = "; the file ends there, it may have been cut off" if error.pos >= len(error.doc.rstrip()) - 1 else ""
        raise ValueError(
            f"{path} ({size} bytes) is not JSON: {error.msg} at line {error.lineno}, column {error.colno}{end}"
        ) from error
    except UnicodeDecodeError as error:
        packed = ": it is compressed (gzip), unpack it" if error.object[:2] == b"\x1f\x8b" else ""
        raise ValueError(f"{path} is not JSON: byte {error.start} is not {error.encoding} text{packed}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be an annotation file") from error


@contextlib.contextmanager
def read_before(path: str, data: dict[str, Any]) -> Iterator[None]:
    """Gives pycocotools the content of a file that was read before: COCO's takes several seconds to read.

    Args:
        path: the file.
        data: what `read_json` gave for it. Loaders must not change it.
    """

    class ReadBefore(pycocotools.coco.COCO):
        def __init__(self, annotation_file: str | None = None) -> None:
            super().__init__(None if annotation_file == path else annotation_file)
            if annotation_file == path:
                self.dataset = data
                self.createIndex()

    original = pycocotools.coco.COCO
    pycocotools.coco.COCO = ReadBefore
    try:
        yield
    finally:
        pycocotools.coco.COCO = original


def check_coco_json(data: Any, image_root: str, needs: Needs, findings: Findings) -> None:
    """Checks the content of a file; see `Findings` for where the result goes."""
    if not isinstance(data, dict):
        line = f"the file holds a {type(data).__name__}, not COCO's object with images and annotations"
        findings.note(line, kind="file-content")
        return
    images, annotations, categories = (
        _get_list(data, key, findings) for key in ("images", "annotations", "categories")
    )
    if "annotations" not in data and not needs.train:  # as in COCO's own test sets
        line = "the file has no 'annotations': predictions will be written and not evaluated"
        findings.note(line, kind="no-annotations", warn=True)
    elif annotations is None:
        findings.note("the file has no list 'annotations'", kind="no-annotations")
    for key, entries in (("images", images), ("categories", categories)):
        if not entries:
            line = f"the file has no {key}: its list {key!r} is {'missing' if entries is None else 'empty'}"
            findings.note(line, kind=f"no-{key}")
    if findings.errors:
        return
    assert images and categories  # for the type checker
    _check_images(images, image_root, findings)
    _check_ids(categories, "categories", lambda i: shorten(categories[i]), findings, only=(int,))
    unnamed = _without(categories, "name", (str,))
    what = "categories have no 'name'"
    findings.count(unnamed, categories, what, lambda i: shorten(categories[i]), kind="category-without-name")
    if annotations and not findings.errors:
        _check_annotations(annotations, images, categories, needs, findings)


def _get_list(data: dict[str, Any], key: str, findings: Findings) -> list[dict[str, Any]] | None:
    """A list of the file, or None if it has none. Entries that are not objects are an error."""
    entries = data.get(key)
    if not isinstance(entries, list):
        return None
    others = [index for index, entry in enumerate(entries) if type(entry) is not dict]
    what = f"entries of {key!r} are not objects"
    findings.count(others, entries, what, lambda i: f"[{i}] is {shorten(entries[i])}", kind="entry-not-dict")
    return entries


def _without(entries: Sequence[dict[str, Any]], key: str, types: tuple[type, ...]) -> list[int]:
    """The entries whose value for a key is missing or of another type than these. A bool is not an int."""
    kinds = [type(entry.get(key)) for entry in entries]
    return [] if set(kinds) <= set(types) else [index for index, kind in enumerate(kinds) if kind not in types]


def _check_ids(
    entries: Sequence[dict[str, Any]],
    noun: str,
    describe: Callable[[int], str],
    findings: Findings,
    only: tuple[type, ...] = (int, str),
) -> None:
    """Checks that all ids are there and differ."""
    kinds = " or ".join("a whole number" if kind is int else "a text" for kind in only)
    what, kind = f"{noun} have no 'id' that is {kinds}", f"{_SINGULAR[noun]}-without-id"
    if findings.count(_without(entries, "id", only), entries, what, describe, kind=kind):
        return
    ids = [entry["id"] for entry in entries]
    if len(set(ids)) < len(ids):
        seen = Counter(ids)
        twice = [index for index, key in enumerate(ids) if seen[key] > 1]
        kind = f"{_SINGULAR[noun]}-duplicate-id"
        findings.count(twice, entries, f"{noun} share their 'id' with another", describe, kind=kind)


def _check_images(images: Sequence[dict[str, Any]], image_root: str, findings: Findings) -> None:
    def describe(index: int) -> str:
        image = images[index]
        return f"id {shorten(image.get('id'))}, file_name {shorten(image.get('file_name'), 200)}"

    _check_ids(images, "images", describe, findings)
    nameless = _without(images, "file_name", (str,)) or [i for i, image in enumerate(images) if not image["file_name"]]
    if not findings.count(nameless, images, "images have no 'file_name'", describe, kind="image-without-file-name"):
        addresses = [i for i, image in enumerate(images) if not image_root and "://" in image["file_name"]]
        asked = "Reading the images asks these servers; check the file if it is from a stranger"
        what = "file names are addresses"
        findings.count(addresses, images, what, describe, kind="image-address", then=asked, warn=True)
        outside = [index for index, image in enumerate(images) if image_root and _leaves(image["file_name"])]
        findings.count(
            outside,
            images,
            f"file names lead out of the data set's folder {image_root}",
            describe,
            kind="image-outside-folder",
            then="The files there will be read as images, and only read; check the file if it is from a stranger",
            warn=True,
        )
    for key in ("width", "height"):
        bad = [i for i, image in enumerate(images) if not _is_size(image.get(key))]
        findings.count(
            bad,
            images,
            f"images have no '{key}' above 0",
            lambda i: f"{describe(i)}, {key} {images[i].get(key)!r}",
            kind="image-size-field",
        )


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and value > 0 and value == value // 1


def _leaves(name: str) -> bool:
    """True if a file name leads out of the folder that it is looked for in."""
    path = posixpath.normpath(name)
    return os.path.isabs(name) or path == ".." or path.startswith("../")


def _check_annotations(
    annotations: Sequence[dict[str, Any]],
    images: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
    needs: Needs,
    findings: Findings,
) -> None:
    def describe(index: int) -> str:
        annotation = annotations[index]
        return f"id {shorten(annotation.get('id'))} of image {shorten(annotation.get('image_id'))}"

    def report(where: Iterable[int], what: str, kind: str, then: str = "", warn: bool = False) -> bool:
        what = f"annotations {what}"
        return findings.count(where, annotations, what, describe, kind=kind, then=then, warn=warn)

    # COCO's evaluation puts them into an array of numbers.
    _check_ids(annotations, "annotations", describe, findings, only=(int,) if needs.coco_evaluation else (int, str))
    if not report(_without(annotations, "image_id", (int, str)), "have no 'image_id'", "annotation-without-image"):
        known = {image.get("id") for image in images if isinstance(image.get("id"), (int, str))}
        lost = [i for i, annotation in enumerate(annotations) if annotation["image_id"] not in known]
        then = "Detectron2 leaves such annotations out"
        if len(lost) == len(annotations):
            then = f"The ids of images are like {shorten(images[0].get('id'))}, and none fits"
        what, some = "are of an image that the file does not have", len(lost) < len(annotations)
        report(lost, what, "annotation-of-unknown-image", then, warn=some)
    what, kind = "have no 'category_id' that is a whole number", "annotation-without-category"
    if not report(_without(annotations, "category_id", (int,)), what, kind):
        ids = {category["id"] for category in categories}
        wrong = [i for i, annotation in enumerate(annotations) if annotation["category_id"] not in ids]
        what = f"have a 'category_id' that no category has (there are {shorten(sorted(ids))})"
        report(wrong, what, "annotation-of-unknown-category")
    ignored = [i for i, annotation in enumerate(annotations) if annotation.get("ignore", 0)]
    what = "have 'ignore' set, which Detectron2 refuses"
    report(ignored, what, "annotation-ignore", "Use 'iscrowd', or take them out")
    boxes = [annotation.get("bbox", [0]) for annotation in annotations]
    empty = [index for index, box in enumerate(boxes) if box is None or box == []]
    report(empty, "have an empty 'bbox', which Detectron2 refuses", "box-empty")
    segmentations = [annotation.get("segmentation") for annotation in annotations]
    report(
        [i for i, value in enumerate(segmentations) if value and not _is_segmentation(value)],
        "have a 'segmentation' that is neither a list of polygons, each [x0, y0, x1, y1, …], nor run lengths "
        "with 'size' and 'counts'",
        "mask-unknown",
    )
    if needs.coco_evaluation:
        _check_for_evaluation(annotations, needs, report)


def _is_segmentation(value: Any) -> bool:
    if type(value) is dict:
        return "size" in value and "counts" in value
    return type(value) is list and all(type(polygon) is list for polygon in value)


def _has_short_polygon(value: Any) -> bool:
    # pycocotools looks at the first polygon; what it makes of later ones has no area.
    return type(value) is list and bool(value) and type(value[0]) is list and len(value[0]) < 6


def _check_for_evaluation(annotations: Sequence[dict[str, Any]], needs: Needs, report: Callable[..., bool]) -> None:
    """Checks what COCO's evaluation reads, which runs last, when training is over."""
    numbers = (int, float)
    fields: dict[str, tuple[type, ...]] = {"bbox": (list,), "area": numbers, "iscrowd": (int, bool)}
    if needs.masks:
        fields["segmentation"] = (list, dict)
    if needs.keypoints:
        fields |= {"keypoints": (list,), "num_keypoints": (int,)}
    for key, types in fields.items():
        what = f"have no '{key}', which COCO's evaluation reads"
        report(_without(annotations, key, types), what, f"annotation-without-{key}")
    if needs.masks:
        empty = [i for i, annotation in enumerate(annotations) if annotation.get("segmentation") == []]
        report(empty, "have an empty 'segmentation', which COCO's evaluation of masks cannot read", "mask-empty")
        short = [i for i, annotation in enumerate(annotations) if _has_short_polygon(annotation.get("segmentation"))]
        what = "have a 'segmentation' with a polygon of less than 3 points (6 numbers)"
        what = f"{what}, which COCO's evaluation of masks takes for a box, or cannot read"
        report(short, what, "mask-few-points")
    zero = [i for i, annotation in enumerate(annotations) if annotation.get("id") == 0]
    report(
        zero,
        "have the id 0, which COCO's evaluation takes for 'not found', so that AP is too low",
        "annotation-id-0",
        "Count from 1",
        warn=True,
    )
