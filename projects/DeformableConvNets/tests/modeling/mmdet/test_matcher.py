# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import torch
from detectron2.modeling.matcher import Matcher

from dcn_d2.modeling import MinimumIoUMatcher

THRESHOLDS, LABELS = [0.3, 0.7], [0, -1, 1]
# Ground truth 0 to 3 (rows) and boxes 0 to 6. Ground truth 0 has its highest IoU, 0.4, with boxes 1 and 2; box 2 has
# a higher one with ground truth 1, whose own best is box 3. Ground truth 2 has an IoU of 0.25 at most, with box 5.
IOU = torch.tensor(
    [
        [0.1, 0.4, 0.4, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.6, 0.9, 0.75, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 0.2],
    ]
)


def test_low_quality_match_takes_over_the_box() -> None:
    matches, labels = MinimumIoUMatcher(THRESHOLDS, LABELS, 0.3)(IOU)
    assert labels.tolist() == [0, 1, 1, 1, 1, 0, 0]
    assert matches.tolist()[1:5] == [0, 0, 1, 1]
    # Detectron2 keeps ground truth 1 for box 2, and takes box 5 for ground truth 2, whatever the IoU.
    matches, labels = Matcher(THRESHOLDS, LABELS, allow_low_quality_matches=True)(IOU)
    assert labels.tolist() == [0, 1, 1, 1, 1, 1, 0]
    assert matches.tolist()[1:5] == [0, 1, 1, 1]


def test_minimum_is_inclusive() -> None:
    iou = torch.tensor([[0.25, 0.125]])
    assert MinimumIoUMatcher(THRESHOLDS, LABELS, 0.25)(iou)[1].tolist() == [1, 0]
    assert MinimumIoUMatcher(THRESHOLDS, LABELS, 0.26)(iou)[1].tolist() == [0, 0]


def test_last_claim_counts() -> None:
    iou = torch.tensor([[0.5, 0.1], [0.4, 0.1], [0.4, 0.2]])
    matches, labels = MinimumIoUMatcher(THRESHOLDS, LABELS, 0.3)(iou)
    assert (matches[0], labels[0]) == (2, 1)


def test_ground_truth_among_the_boxes_does_not_hide_the_best_proposal() -> None:
    """Proposal 1 is the best for ground truth 0 and, of its own, closer to ground truth 1."""
    iou = torch.tensor([[0.5, 0.6, 0.0, 1.0, 0.2], [0.0, 0.8, 0.9, 0.2, 1.0]])
    matches, labels = MinimumIoUMatcher([0.5], [0, 1], 0.5, truth_appended=True)(iou)
    assert matches.tolist() == [0, 0, 1, 0, 1] and labels.tolist() == [1] * 5
    assert MinimumIoUMatcher([0.5], [0, 1], 0.5)(iou)[0].tolist() == [0, 1, 1, 0, 1]
    no_truth = MinimumIoUMatcher([0.5], [0, 1], 0.5, truth_appended=True)(torch.zeros(0, 3))
    assert no_truth[1].tolist() == [0, 0, 0]


def test_no_ground_truth_and_no_boxes() -> None:
    matcher = MinimumIoUMatcher(THRESHOLDS, LABELS, 0.3)
    for shape in ((0, 5), (3, 0), (0, 0)):
        matches, labels = matcher(torch.zeros(shape))
        assert matches.tolist() == labels.tolist() == [0] * shape[1]
