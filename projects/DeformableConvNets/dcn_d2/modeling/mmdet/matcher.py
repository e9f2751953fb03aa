# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""MMDetection's matching of boxes with ground truth, where it differs from Detectron2's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.matcher import Matcher
from torch import Tensor


class MinimumIoUMatcher(Matcher):
    """A `Matcher` in which each ground-truth box takes the boxes that fit it best, if they fit well enough.

    A low-quality match is a match below the thresholds: a ground-truth box that no box fits well is matched with the
    best that there is. Here a ground-truth box does so if its highest IoU is at least `low_quality_iou`. It takes all
    boxes that have this IoU with it, even one that has a higher IoU with other ground truth. If several ground-truth
    boxes take one box, the last of them gets it. In Detectron2 there is no minimum, and a box keeps the ground truth
    with which it has its own highest IoU.

    Example:
        >>> import torch
        >>> from dcn_d2.modeling import MinimumIoUMatcher
        >>> match = MinimumIoUMatcher([0.3, 0.7], [0, -1, 1], low_quality_iou=0.4)
        >>> match(torch.tensor([[0.8, 0.1],  # IoUs of ground truth 0 with two boxes
        ...                     [0.5, 0.2]]))  # ground truth 1 fits box 0 best, and takes it from ground truth 0
        (tensor([1, 1]), tensor([1, 0], dtype=torch.int8))

    Args:
        thresholds: IoUs that separate the labels.
        labels: 0, 1 or -1 (ignored) for the IoUs below, between and above the thresholds.
        low_quality_iou: minimum IoU of low-quality matches.
        truth_appended: the last boxes are the ground truth itself, in its order. MMDetection adds it to the proposals
            after it has matched them. So each of these boxes is matched with itself, and is left out when the best
            boxes of a ground-truth box are looked for: its IoU of 1 would always be the highest.
    """

    def __init__(
        self,
        thresholds: Sequence[float],
        labels: Sequence[int],
        low_quality_iou: float,
        truth_appended: bool = False,
    ) -> None:
        super().__init__(list(thresholds), list(labels), allow_low_quality_matches=False)
        self.low_quality_iou = low_quality_iou
        self.truth_appended = truth_appended

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (M ground truth, N boxes) IoUs to (N,) indices of ground truth and (N,) labels, as `Matcher` does."""
        if self.truth_appended:
            truths, boxes = match_quality_matrix.shape
            matches, labels = self._match(match_quality_matrix[:, : boxes - truths])
            own = torch.arange(truths, device=matches.device)
            return torch.cat([matches, own]), torch.cat([labels, torch.ones_like(own, dtype=labels.dtype)])
        return self._match(match_quality_matrix)

    def _match(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        matches, labels = super().__call__(match_quality_matrix)
        if match_quality_matrix.numel() == 0:
            return matches, labels
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        claims = (match_quality_matrix == best) & (best >= self.low_quality_iou)
        numbers = torch.arange(len(claims), device=claims.device)[:, None]
        last_claim = torch.where(claims, numbers, -1).amax(dim=0)
        claimed = last_claim >= 0
        return torch.where(claimed, last_claim, matches), labels.masked_fill(claimed, 1)
