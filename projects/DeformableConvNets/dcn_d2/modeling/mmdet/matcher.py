# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""MMDetection's matching of boxes with ground truth, where it differs from Detectron2's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.matcher import Matcher
from torch import Tensor


class MinimumIoUMatcher(Matcher):
    """A `Matcher` whose low-quality matches need a minimum IoU and take over the box that they match.

    Every ground-truth box with an IoU of `low_quality_iou` or more with some box is matched with the boxes of its
    highest IoU, all of them, even if those have a higher IoU with other ground truth; of several such claims the last
    counts. Detectron2's own low-quality matches need no minimum, and such a box keeps the ground truth of its own
    highest IoU.

    Args:
        thresholds: IoUs that separate the labels.
        labels: 0, 1 or -1 (ignored) for the IoUs below, between and above the thresholds.
        low_quality_iou: the minimum.
        truth_appended: the last boxes are the ground truth itself, in its order. MMDetection adds it to the proposals
            after it has matched them: each is matched with itself, and its IoU of 1 does not keep proposals from being
            the best.
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
