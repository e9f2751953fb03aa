# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""How much two sets of detections, or of feature maps, differ, and whether that is rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Differences that rounding may cause.

    Attributes:
        box: of coordinates, in pixels.
        score: of scores.
        mask: share of the pixels of masks in the size of the image. Of the pixels inside of masks it may be ten times
            as much.
        unmatched: share of detections without a partner: rounding decides which of two overlapping boxes is kept.
        feature: of a feature map, as a share of its values (root mean squares).
        near: partners differ by less than so many times `box` and `score`. With 1, what differs more is unmatched.
    """

    box: float
    score: float
    mask: float
    unmatched: float
    feature: float
    near: float = 1.0


TOLERANCES = {
    "float32": Tolerance(box=1e-2, score=1e-4, mask=1e-4, unmatched=0.0, feature=1e-4, near=20.0),
    # Of 16 bits 11 or 8 are digits: a few boxes move far, and others are kept.
    "float16": Tolerance(box=2.0, score=2e-2, mask=5e-2, unmatched=0.1, feature=1e-2),
    "bfloat16": Tolerance(box=8.0, score=1e-1, mask=2e-1, unmatched=0.3, feature=1e-1),
}
# So many pixels of masks may differ however small the masks are.
_FEW = 5


@dataclass
class Comparison:
    """What was compared, and the largest differences found.

    Attributes:
        runs: how often the graph ran.
        expected: number of the model's detections.
        found: number of the graph's detections.
        matched: how many of the two are the same object: same class, box and score close.
        at_limit: how many others have a score so close to the lowest one that rounding decides whether they are given.
        box, score: largest differences of matched ones.
        image_pixels: pixels of the masks of matched ones, in the size of the image.
        mask_pixels: how many of them are inside of a mask.
        differing_pixels: how many of them are inside of one mask of two only.
        features: largest difference of a feature map, as a share of its values (root mean squares).
        threshold: lowest score of the detections, where it was lowered to have more of them.
    """

    runs: int = 0
    expected: int = 0
    found: int = 0
    matched: int = 0
    at_limit: int = 0
    box: float = 0.0
    score: float = 0.0
    image_pixels: int = 0
    mask_pixels: int = 0
    differing_pixels: int = 0
    features: float | None = None
    threshold: float | None = None

    @property
    def mask(self) -> float:
        """The share of differing pixels of masks, in the size of the image."""
        return self.differing_pixels / max(self.image_pixels, 1)

    @property
    def mask_inside(self) -> float:
        """The share of differing pixels among those inside of a mask; 0 for a few pixels, of small masks."""
        return self.differing_pixels / self.mask_pixels if self.differing_pixels > _FEW else 0.0

    def add(self, expected: Instances, found: Instances, limit: float, tolerance: Tolerance) -> None:
        """Compares the detections of an image.

        Args:
            expected: the model's.
            found: the graph's, in the same pixels.
            limit: the score that all detections are above.
            tolerance: for the match.
        """
        pairs = match(expected, found, tolerance)
        rest = set(range(len(expected))) - set(pairs), set(range(len(found))) - set(pairs.values())
        margin = min(tolerance.score, limit / 100)
        for instances, numbers in zip((expected, found), rest):
            self.at_limit += sum(float(instances.scores[number]) - limit <= margin for number in numbers)
        self.expected += len(expected)
        self.found += len(found)
        self.matched += len(pairs)
        if not pairs:
            return
        one, other = expected[list(pairs)], found[list(pairs.values())]
        self.box = max(self.box, largest(one.pred_boxes.tensor - other.pred_boxes.tensor))
        self.score = max(self.score, largest(one.scores - other.scores))
        if expected.has("pred_masks"):
            self.image_pixels += one.pred_masks.numel()
            self.mask_pixels += int((one.pred_masks | other.pred_masks).sum())
            self.differing_pixels += int((one.pred_masks ^ other.pred_masks).sum())

    def add_features(self, expected: Mapping[str, Tensor], found: Mapping[str, np.ndarray]) -> None:
        """Compares feature maps."""
        for name, value in expected.items():
            difference = (value - torch.as_tensor(found[name])).norm() / value.norm().clamp(min=1e-12)
            self.features = float(np.maximum(self.features or 0.0, float(difference)))  # NaN if one of them is

    def problems(self, tolerance: Tolerance) -> list[str]:
        """Says what is above a tolerance; [] if nothing is."""
        unmatched = self.expected + self.found - 2 * self.matched - self.at_limit
        found = []
        if unmatched > tolerance.unmatched * (self.expected + self.found):
            found.append(f"{unmatched} detections of {self.expected} and {self.found} have no partner")
        for what, value, most, unit in (
            ("boxes", self.box, tolerance.box, " px"),
            ("scores", self.score, tolerance.score, ""),
            ("the share of differing mask pixels", self.mask, tolerance.mask, ""),
            ("the share of differing pixels inside of masks", self.mask_inside, 10 * tolerance.mask, ""),
            ("feature maps", self.features or 0.0, tolerance.feature, " of their values"),
        ):
            if not value <= most:  # NaN too
                found.append(f"{what}: {value:.2g}{unit}, at most {most:g} was expected")
        return found

    def __str__(self) -> str:
        if self.features is not None:
            return f"{self.runs} runs; the feature maps differ by at most {self.features:.1e} of their values (RMS)"
        masks = f", {self.differing_pixels} of {self.mask_pixels} pixels inside of masks" if self.mask_pixels else ""
        lowered = "" if self.threshold is None else f" with scores above {self.threshold:.2g}"
        limit = f" ({self.at_limit} at the lowest score differ)" if self.at_limit else ""
        return (
            f"{self.matched} of {self.expected} detections{lowered} matched{limit} in {self.runs} runs; largest "
            f"differences: boxes {self.box:.1e} px, scores {self.score:.1e}{masks}"
        )


def match(expected: Instances, found: Instances, tolerance: Tolerance) -> dict[int, int]:
    """Pairs detections of the same class that differ little, the closest first: equal scores may have any order."""
    boxes = (expected.pred_boxes.tensor[:, None] - found.pred_boxes.tensor[None]).abs().amax(dim=-1) / tolerance.box
    scores = (expected.scores[:, None] - found.scores[None]).abs() / tolerance.score
    same = expected.pred_classes[:, None] == found.pred_classes[None]
    near = same & (boxes <= tolerance.near) & (scores <= tolerance.near)
    ones, others = near.nonzero(as_tuple=True)
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    for position in (boxes + scores)[ones, others].argsort().tolist():
        one, other = int(ones[position]), int(others[position])
        if one not in pairs and other not in taken:
            pairs[one] = other
            taken.add(other)
    return dict(sorted(pairs.items()))


def largest(values: Tensor) -> float:
    """The largest absolute value; 0 of none."""
    return float(values.abs().max()) if values.numel() else 0.0
