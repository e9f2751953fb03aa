# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Largest differences between what two implementations of a detector gave for one image."""

from __future__ import annotations

from typing import Any

import numpy as np

Outputs = dict[str, np.ndarray]


def match(ours: np.ndarray, theirs: np.ndarray, reach: float) -> list[tuple[int, int]]:
    """Pairs up boxes, (n, 4) and (m, 4), one to one, nearest first, none further apart than `reach` in a coordinate."""
    if not len(ours) or not len(theirs):
        return []
    distance = np.abs(ours[:, None] - theirs[None]).max(-1)
    pairs: list[tuple[int, int]] = []
    used_ours, used_theirs = set(), set()
    candidates = np.argwhere(distance <= reach)
    for i, j in candidates[np.argsort(distance[tuple(candidates.T)], kind="stable")]:
        if i not in used_ours and j not in used_theirs:
            used_ours.add(i)
            used_theirs.add(j)
            pairs.append((int(i), int(j)))
    return pairs


def match_detections(ours: Outputs, theirs: Outputs, reach: float = 1.0) -> list[tuple[int, int]]:
    """Pairs up detections of the same class, nearest boxes first."""
    # Classes are put so far apart that boxes of different ones cannot meet.
    apart = 1e5
    boxes = [o["boxes"].astype(np.float64) + apart * o["labels"][:, None] for o in (ours, theirs)]
    return match(boxes[0], boxes[1], reach)


def _largest(difference: np.ndarray) -> float:
    return float(np.abs(difference).max()) if difference.size else 0.0


def compare(ours: Outputs, theirs: Outputs) -> dict[str, Any]:
    """Differences of two outputs; the names are the columns of results/parity.csv.

    Outputs hold `input` (3, H, W), `p2` to `p6`, `proposals` (n, 4), `boxes` (n, 4), `scores`, `labels`, and for models
    with masks `masks` (n, h, w). What is missing in both is left out.
    """
    row: dict[str, Any] = {}
    if "input" in theirs:
        if ours["input"].shape != theirs["input"].shape:
            raise AssertionError(f"the network's input is {ours['input'].shape}, MMDetection's {theirs['input'].shape}")
        row["input"] = _largest(ours["input"] - theirs["input"])
    levels = [name for name in ("p2", "p3", "p4", "p5", "p6") if name in theirs]
    row["fpn"] = max(_largest(ours[name] - theirs[name]) for name in levels)
    row["proposals"] = len(theirs["proposals"])
    pairs = match(ours["proposals"], theirs["proposals"], 1.0)
    row["proposals_matched"] = len(pairs)
    row["proposals_px"] = max((_largest(ours["proposals"][i] - theirs["proposals"][j]) for i, j in pairs), default=0.0)
    row["detections"] = len(theirs["boxes"])
    row["detections_ours"] = len(ours["boxes"])
    pairs = match_detections(ours, theirs)
    row["detections_matched"] = len(pairs)
    row["classes"] = len(set(theirs["labels"].tolist()))
    row["boxes_px"] = max((_largest(ours["boxes"][i] - theirs["boxes"][j]) for i, j in pairs), default=0.0)
    row["scores"] = max((_largest(ours["scores"][i] - theirs["scores"][j]) for i, j in pairs), default=0.0)
    if "masks" in theirs:
        different = sum(int((ours["masks"][i] != theirs["masks"][j]).sum()) for i, j in pairs)
        row["mask_pixels"] = different / max(sum(int(theirs["masks"][j].sum()) for _, j in pairs), 1)
    return row
