# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .utils import rgb2id


def pq_compute(gt_json_file: str, pred_json_file: str, gt_folder: str, pred_folder: str) -> dict[str, Any]:
    """Panoptic quality: of each category, the sum of IoUs above 0.5 by the mean number of true and found segments."""
    truth, found = (json.loads(Path(file).read_text()) for file in (gt_json_file, pred_json_file))
    predictions = {entry["image_id"]: entry for entry in found["annotations"]}
    ious: dict[int, float] = defaultdict(float)
    matched: dict[int, int] = defaultdict(int)
    segments: dict[int, int] = defaultdict(int)
    for entry in truth["annotations"]:
        predicted = predictions[entry["image_id"]]
        real = rgb2id(np.asarray(Image.open(Path(gt_folder) / entry["file_name"])))
        seen = rgb2id(np.asarray(Image.open(Path(pred_folder) / predicted["file_name"])))
        for segment in [*entry["segments_info"], *predicted["segments_info"]]:
            segments[segment["category_id"]] += 1
        for a in entry["segments_info"]:
            for b in predicted["segments_info"]:
                one, other = real == a["id"], seen == b["id"]
                iou = (one & other).sum() / (one | other).sum()
                if a["category_id"] == b["category_id"] and iou > 0.5:
                    ious[a["category_id"]] += iou
                    matched[a["category_id"]] += 1
    return {
        name: _average([c["id"] for c in truth["categories"] if c["isthing"] in kinds], ious, matched, segments)
        for name, kinds in (("All", (0, 1)), ("Things", (1,)), ("Stuff", (0,)))
    }


def _average(categories: list[int], ious: Any, matched: Any, segments: Any) -> dict[str, float]:
    there = [c for c in categories if segments[c]]
    quality = [2 * ious[c] / segments[c] for c in there]
    segmentation = [ious[c] / matched[c] if matched[c] else 0.0 for c in there]
    recognition = [2 * matched[c] / segments[c] for c in there]
    return {
        "pq": float(np.mean(quality)),
        "sq": float(np.mean(segmentation)),
        "rq": float(np.mean(recognition)),
        "n": len(there),
    }
