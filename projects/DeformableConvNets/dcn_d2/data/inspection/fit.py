# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Compares boxes with what a config makes of them: resizing, anchors, detections of an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

from ..findings import Findings
from .columns import Columns

TINY = 4.0  # pixels after resizing: the step of the finest feature map that detectors here have
RANGE_STEPS = 5  # sizes that stand for a range of them


def inspect_fit(columns: Columns, cfg: CfgNode, train: bool, findings: Findings) -> None:
    """Notes boxes that a config's model can hardly learn or find."""
    where = np.flatnonzero(columns.usable & np.isfinite(columns.sizes[columns.image]).all(1))
    lengths = columns.lengths[where]
    factors = resize_factors(cfg, columns.sizes, train)[:, columns.image[where]]
    largest = lengths * factors.max(0, initial=0)[:, None]
    tiny = largest.min(1, initial=np.inf) < TINY

    def describe(index: int) -> str:
        width, height = largest[np.searchsorted(where, index)]
        return f"{columns.describe(index)} is {width:.1f} x {height:.1f} pixels after resizing"

    key = "INPUT.MIN_SIZE_TRAIN" if train else "INPUT.MIN_SIZE_TEST"
    findings.count(
        where[tiny].tolist(),
        columns.all,
        f"annotations have a 'bbox' that is less than {TINY:g} pixels wide or high after resizing",
        describe,
        kind="box-tiny",
        then=f"A detector can hardly learn them. Enlarge images ({key}), cut them into tiles, or leave such boxes out",
        warn=True,
    )
    if train:
        _inspect_anchors(columns, where[~tiny], lengths[~tiny], factors[:, ~tiny], cfg, findings)
    counts, limit = columns.counts(), cfg.TEST.DETECTIONS_PER_IMAGE
    findings.count(
        np.flatnonzero(counts > limit).tolist() if limit >= 0 else [],
        columns.records,
        f"images have more objects than TEST.DETECTIONS_PER_IMAGE, {limit}",
        lambda index: f"{columns.records[index]['file_name']} has {counts[index]}",
        kind="many-objects",
        then="The others cannot be found. COCO's evaluation counts 100 detections of an image at most, too",
        warn=True,
    )


def resize_factors(cfg: CfgNode, sizes: np.ndarray, train: bool) -> np.ndarray:
    """By what each image may be multiplied.

    Args:
        cfg: with INPUT.
        sizes: (images, 2), width and height.
        train: for training, else for tests.

    Returns:
        (k, images), for each length of the shorter edge that is drawn.
    """
    edges: Sequence[float] = cfg.INPUT.MIN_SIZE_TRAIN if train else [cfg.INPUT.MIN_SIZE_TEST]
    longest = cfg.INPUT.MAX_SIZE_TRAIN if train else cfg.INPUT.MAX_SIZE_TEST
    if train and cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        edges = np.linspace(min(edges), max(edges), RANGE_STEPS).tolist()
    factors = [
        np.minimum(edge / sizes.min(1), longest / sizes.max(1)) if edge else np.ones(len(sizes)) for edge in edges
    ]
    return np.array(factors)


def read_anchors(cfg: CfgNode) -> tuple[np.ndarray, float] | None:
    """The (n, 2) widths and heights of a config's anchors, and the overlap below which they are background.

    None for models without such anchors.
    """
    model = cfg.MODEL.META_ARCHITECTURE
    if model == "RetinaNet":
        node = cfg.MODEL.RETINANET
    elif model in ("GeneralizedRCNN", "PanopticFPN", "ProposalNetwork") and cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RPN":
        node = cfg.MODEL.RPN
    else:
        return None
    if cfg.MODEL.ANCHOR_GENERATOR.NAME != "DefaultAnchorGenerator" or cfg.MODEL.LOAD_PROPOSALS:
        return None
    sizes, ratios = cfg.MODEL.ANCHOR_GENERATOR.SIZES, cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS
    generator = DefaultAnchorGenerator(sizes=sizes, aspect_ratios=ratios, strides=[1] * len(node.IN_FEATURES))
    corners = np.concatenate([anchors.numpy() for anchors in generator.cell_anchors])
    return np.unique((corners[:, 2:] - corners[:, :2]).astype(np.float64), axis=0), node.IOU_THRESHOLDS[0]


def _inspect_anchors(
    columns: Columns, where: np.ndarray, lengths: np.ndarray, factors: np.ndarray, cfg: CfgNode, findings: Findings
) -> None:
    """Notes boxes whose overlap with each anchor is background even if both have the same centre."""
    found = read_anchors(cfg)
    if found is None or not len(where):
        return
    anchors, threshold = found
    overlap = np.zeros(len(where))
    for factor in factors:
        resized = lengths * factor[:, None]
        for anchor in anchors:
            common = np.minimum(resized, anchor).prod(1)
            np.maximum(overlap, common / (resized.prod(1) + anchor.prod() - common), out=overlap)
    missed = overlap < threshold
    of = dict(zip(where[missed].tolist(), np.flatnonzero(missed).tolist()))
    largest = lengths * factors.max(0)[:, None]

    def describe(index: int) -> str:
        width, height = largest[of[index]]
        size = f"{width:.0f} x {height:.0f} pixels after resizing (IoU {overlap[of[index]]:.2f})"
        return f"{columns.describe(index)} is {size}"

    findings.count(
        of,
        columns.all,
        f"annotations have a 'bbox' that no anchor reaches: IoU below {threshold:g} with each, wherever it lies",
        describe,
        kind="box-without-anchor",
        then="Adapt MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS, or INPUT.MIN_SIZE_TRAIN, if they are many",
        warn=True,
    )
