# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What an annotation file of the user's own has, and whether its classes are those of the training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from ...config.messages import nearest
from ..coco_json import check_coco_json, read_json
from ..findings import Findings, show
from ..needs import Needs, list_names

WAY = "a category without objects may stay in the list"


class OwnFile(NamedTuple):
    """An annotation file and its folder of images, as an argument of the command line names them."""

    argument: str  # for messages
    json_file: str
    image_root: str
    content: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """The names of its categories, in the order of their ids."""
        return [category["name"] for category in sorted(self.content["categories"], key=lambda entry: entry["id"])]

    @property
    def annotations(self) -> list[dict[str, Any]]:
        """Its annotations; [] where it has none, as COCO's own test sets."""
        return self.content.get("annotations") or []

    def count_objects(self) -> Counter[str]:
        """How many objects there are of each name; groups of objects (iscrowd) are not counted."""
        names = {category["id"]: category["name"] for category in self.content["categories"]}
        return Counter(names[entry["category_id"]] for entry in self.annotations if not entry.get("iscrowd", 0))


def read_own_file(argument: str, json_file: str, image_root: str, needs: Needs) -> OwnFile:
    """Reads an annotation file and checks what it holds.

    Args:
        argument: of the command line, for messages.
        json_file: its path.
        image_root: the folder of its images.
        needs: what it is for.

    Raises:
        ValueError: It is not a file in COCO's format, or its names of categories cannot be those of classes.
    """
    try:
        content = read_json(json_file)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error
    findings = Findings(f"{argument} {show(json_file)}")
    check_coco_json(content, image_root, needs, findings)
    findings.refuse()
    own = OwnFile(argument, json_file, image_root, content)
    names = own.names
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise ValueError(
            f"{findings.subject}: several categories are called {list_names(twice)}: give each its own name"
        )
    if bad := [name for name in names if not name.strip() or not name.isprintable()]:
        listed = ", ".join(map(repr, bad[:8]))
        raise ValueError(f"{findings.subject}: names of categories are empty or not printable: {listed}")
    return own


def check_same_classes(files: Sequence[OwnFile]) -> list[str]:
    """Gives the names of the classes of files that train together; the first file says their order.

    Raises:
        ValueError: A file has other names: its objects of the classes that it lacks would train as background.
    """
    names = files[0].names
    for other in files[1:]:
        lacking = [name for name in names if name not in other.names]
        further = [name for name in other.names if name not in names]
        if lacking or further:
            parts = [f"lacks {list_names(lacking)}"] * bool(lacking)
            parts += [f"also has {list_names(further)}"] * bool(further)
            raise ValueError(
                f"{other.argument} {show(other.json_file)} {' and '.join(parts)}, compared with the classes of "
                f"{show(files[0].json_file)} ({list_names(names)}). Files that train together must have the same "
                f"categories, in any order: {WAY}, if its objects are annotated wherever there are some"
            )
    return names


def refuse_unknown(found: Collection[str], names: Sequence[str], file: str) -> None:
    """Refuses a file with objects of categories `found` that are not among the classes `names`."""
    if found:
        first = min(found)
        raise ValueError(
            f"{show(file)} has objects of the categories {list_names(sorted(found))}, which are none of the model's "
            f"classes ({list_names(names)}){nearest(first, names) or '.'} Rename them, or take their annotations out"
        )


def match_classes(file: OwnFile, names: Sequence[str]) -> list[str]:
    """Checks that a file for tests can be evaluated with classes of these names; gives notes for the log.

    Raises:
        ValueError: It has objects of other categories, or none of the classes.
    """
    unknown = [name for name in file.names if name not in names]
    called = {category["id"]: category["name"] for category in file.content["categories"]}
    found = {called[annotation["category_id"]] for annotation in file.annotations}
    refuse_unknown(found.intersection(unknown), names, f"{file.argument} {file.json_file}")
    shared = [name for name in file.names if name in names]
    if not shared:
        raise ValueError(
            f"{file.argument} {show(file.json_file)}: its categories ({list_names(file.names)}) are none of the "
            f"model's classes ({list_names(names)})"
        )
    notes = []
    if unknown:
        notes.append(f"its categories {list_names(unknown)} have no objects and are left out")
    if len(shared) < len(names):
        rest = list_names([name for name in names if name not in shared])
        notes.append(f"it does not list {rest}: what the model finds of these does not count")
    if shared != [name for name in names if name in shared]:
        notes.append("it lists its categories in another order than the training: they are matched by name")
    return [f"{file.argument} {show(file.json_file)}: {note}" for note in notes]
