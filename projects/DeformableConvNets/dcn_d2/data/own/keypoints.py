# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Keypoints of the user's own data: their names, their sigmas, and which ones change places in a mirror."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES

from ..findings import show
from ..needs import list_names
from .categories import OwnFile

SIDES = (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"))


class Keypoints(NamedTuple):
    """The keypoints of a data set."""

    names: tuple[str, ...]
    flip_map: tuple[tuple[str, str], ...]
    sigmas: tuple[float, ...]  # () where the file has none


def read_keypoints(files: Sequence[OwnFile]) -> Keypoints:
    """Reads what the categories of files say of their keypoints.

    A category has "keypoints", the names. It may have "sigmas", the tolerances of COCO's evaluation, and "flip_map",
    pairs of names. Without "flip_map", names that differ only in "left" and "right" are pairs.

    Raises:
        ValueError: There are none, or categories or files differ in them.
    """
    found: list[tuple[str, Keypoints]] = []
    for file in files:
        for category in file.content["categories"]:
            if category.get("keypoints"):
                place = f"{file.argument} {show(file.json_file)}, category {show(category['name'])!r}"
                found.append((place, _read_category(category, place)))
    if not found:
        raise ValueError(
            f"{files[0].argument} {show(files[0].json_file)}: MODEL.KEYPOINT_ON is True, but no category has a list "
            '"keypoints" of the names of its keypoints'
        )
    place, keypoints = found[0]
    for other_place, other in found[1:]:
        if other != keypoints:
            raise ValueError(
                f"{other_place}: its keypoints ({list_names(other.names)}), flip_map or sigmas differ from those of "
                f"{place} ({list_names(keypoints.names)}), but a model has one list of keypoints for all"
            )
    return keypoints


def _read_category(category: dict[str, Any], place: str) -> Keypoints:
    names = category["keypoints"]
    if not _is_list_of(names, str) or len(set(names)) < len(names):
        raise ValueError(f'{place}: "keypoints" must be a list of names that differ')
    pairs = category.get("flip_map")
    if pairs is None:
        pairs = pair_sides(names)
    elif not isinstance(pairs, list) or not all(_is_list_of(pair, str) and len(pair) == 2 for pair in pairs):
        raise ValueError(f'{place}: "flip_map" must be a list of pairs of names')
    flipped = [name for pair in pairs for name in pair]
    if len(set(flipped)) < len(flipped) or not set(flipped) <= set(names):
        raise ValueError(f'{place}: "flip_map" may name each of the "keypoints" once, and nothing else')
    sigmas = category.get("sigmas") or []
    if sigmas and not (_is_list_of(sigmas, (int, float)) and len(sigmas) == len(names) and min(sigmas) > 0):
        raise ValueError(f'{place}: "sigmas" must be {len(names)} numbers above 0, one for each keypoint')
    return Keypoints(
        tuple(names), tuple((left, right) for left, right in pairs), tuple(float(sigma) for sigma in sigmas)
    )


def _is_list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) and not isinstance(one, bool) for one in value)


def pair_sides(names: Sequence[str]) -> list[tuple[str, str]]:
    """Gives the pairs of names that differ only in "left" and "right"."""
    pairs = []
    for name in names:
        for left, right in SIDES:
            other = re.sub(left, right, name)
            if other != name and other in names:
                pairs.append((name, other))
                break
    return pairs


def check_sigmas(keypoints: Keypoints, configured: Sequence[float]) -> None:
    """Refuses an evaluation of other keypoints than COCO's without tolerances of their own.

    By itself COCO's evaluation takes those of a person's 17 keypoints for any 17, and refuses other numbers.
    """
    if not (keypoints.sigmas or configured) and keypoints.names != COCO_PERSON_KEYPOINT_NAMES:
        raise ValueError(
            f"the keypoints ({list_names(keypoints.names)}) have no tolerances for COCO's evaluation: give their "
            f'category "sigmas", or set TEST.KEYPOINT_OKS_SIGMAS to {len(keypoints.names)} numbers (COCO\'s are 0.025 '
            "for an eye to 0.107 for a hip)"
        )
