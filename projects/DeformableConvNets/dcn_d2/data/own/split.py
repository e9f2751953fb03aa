# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Divides one annotation file into images for training and images for tests."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any, NamedTuple

from .categories import OwnFile


class Split(NamedTuple):
    """Two annotation files that have no image in common, and what to know about them."""

    train: dict[str, Any]
    test: dict[str, Any]
    only_in_train: list[str]  # names of categories
    only_in_test: list[str]


def split_file(file: OwnFile, fraction: float) -> Split:
    """Divides a file, in the same way each time.

    A digest of its file name decides where an image goes, so the order of the file does not matter. Each category that
    at least two images have is in both parts, where that is possible. Groups of objects (iscrowd) and images without
    objects are kept.

    Args:
        file: what is divided.
        fraction: of the images that go to the training.

    Raises:
        ValueError: There are less than two images.
    """
    names = {category["id"]: category["name"] for category in file.content["categories"]}
    image_names = {image["id"]: image["file_name"] for image in file.content["images"]}
    images_of: dict[str, set[str]] = defaultdict(set)  # name of a category: file names
    for annotation in file.annotations:
        if not annotation.get("iscrowd", 0) and annotation["image_id"] in image_names:
            images_of[names[annotation["category_id"]]].add(image_names[annotation["image_id"]])
    # By file name and not by id: an image that the file lists twice must not be in both parts.
    order = sorted(set(image_names.values()), key=_digest)
    if len(order) < 2:
        raise ValueError(f"--split: {file.json_file} has {len(order)} image, which cannot be divided")
    in_train = _choose(order, images_of, min(max(round(fraction * len(order)), 1), len(order) - 1))
    in_test = set(order) - in_train
    return Split(
        _part(file, {key for key, name in image_names.items() if name not in in_test}, rest=True),
        _part(file, {key for key, name in image_names.items() if name in in_test}),
        sorted(name for name, found in images_of.items() if not found & in_test),
        sorted(name for name, found in images_of.items() if not found & in_train),
    )


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogatepass")).digest()


def _choose(order: list[str], images_of: dict[str, set[str]], number: int) -> set[str]:
    """Chooses about `number` images for training, first those that put each category in both parts."""
    train: set[str] = set()
    test: set[str] = set()
    for _, found in sorted(images_of.items(), key=lambda item: (len(item[1]), item[0])):
        if not found & train:
            train.update([name for name in order if name in found and name not in test][:1])
        if not found & test and len(found) > 1:
            test.update([name for name in reversed(order) if name in found and name not in train][:1])
    free = [name for name in order if name not in train and name not in test]
    train.update(free[: max(0, number - len(train))])
    if len(train) == len(order):
        train.discard(order[-1])
    return train


def _part(file: OwnFile, ids: set[Any], rest: bool = False) -> dict[str, Any]:
    """The images with these ids and their annotations; with `rest`, also annotations of images that are not there."""
    everywhere = {image["id"] for image in file.content["images"]}
    return file.content | {
        "images": [image for image in file.content["images"] if image["id"] in ids],
        "annotations": [
            annotation
            for annotation in file.annotations
            if annotation["image_id"] in ids or (rest and annotation["image_id"] not in everywhere)
        ],
    }
