# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Narrow models of every kind against outputs of MMDetection that are kept in `golden/`; runs without mmdet."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.parity import ours
from benchmarks.parity.compare import compare
from benchmarks.parity.rows import TOLERANCES
from benchmarks.parity.weights import seeded_state_dict

from . import golden

# Masks of these small images have fewer than 30,000 pixels in all: 1e-4 of them would be one or two.
ALLOWED = TOLERANCES | {"mask_pixels": 1e-3}


def run(name: str, **changes: Any) -> dict[str, Any]:
    """Runs a case here and compares it with its file; `changes` are config keys with "__" for dots."""
    origin, centres, theirs = golden.load(name)
    cfg = ours.config(origin["row"])
    golden.slim_detectron2(cfg, origin["pooler"])
    cfg.merge_from_list([item for key, value in changes.items() for item in (key.replace("__", "."), value)])
    model = ours.build(cfg)
    state = seeded_state_dict(origin["shapes"], origin["seed"], origin["gains"], centres)
    ours.fill(model, {key: torch.from_numpy(value) for key, value in state.items()})
    image = golden.image(origin["seed"])
    found = golden.thin(ours.predict_resized(model, image, *image.shape[:2]))
    return compare(found, theirs)


@pytest.mark.parametrize("name", golden.CASES)
def test_outputs_equal_those_of_mmdetection(name: str) -> None:
    row = run(name)
    assert row["proposals_matched"] == row["proposals"] == golden.PROPOSALS, row
    assert row["detections_matched"] == row["detections_ours"] == row["detections"] >= 10, row
    worse = {key: row[key] for key, allowed in ALLOWED.items() if row.get(key, 0.0) > allowed}
    assert not worse, f"differences above {ALLOWED}: {row}"


ROUNDED_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))


# One wrong fact each, to see that the comparison would notice.
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("faster_mdconv", {"MODEL__RESNETS__STRIDE_IN_1X1": True}),
        ("faster_mdconv", {"MODEL__ROI_BOX_HEAD__POOLER_SAMPLING_RATIO": 2}),
        ("mask_dconv", {"MODEL__ROI_MASK_HEAD__POOLER_SAMPLING_RATIO": 2}),
        ("cascade_mask_dconv", {"MODEL__DCN__CASCADE_AVERAGE_LOGITS": False}),
        ("cascade_mask_dconv", {"MODEL__ROI_BOX_CASCADE_HEAD__BBOX_REG_WEIGHTS": ROUNDED_WEIGHTS}),
        ("mdpool_original", {"MODEL__ROI_BOX_HEAD__POOLER_TYPE": "ModulatedDeformRoIPool"}),
        ("mdpool_aligned", {"MODEL__ROI_BOX_HEAD__POOLER_TYPE": "ModulatedDeformPSRoIPool"}),
    ],
)
def test_a_wrong_fact_is_noticed(name: str, changes: dict[str, Any]) -> None:
    row = run(name, **changes)
    equal = row["detections_matched"] == row["detections_ours"] == row["detections"]
    assert not equal or any(row.get(key, 0.0) > allowed for key, allowed in ALLOWED.items()), row
