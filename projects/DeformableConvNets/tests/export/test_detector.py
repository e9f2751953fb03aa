# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The module that exporters take gives Detectron2's detections."""

from __future__ import annotations

import pytest
import torch

from dcn_d2 import model_zoo
from dcn_d2.export.detector import ExportableDetector

from .models import detect_eagerly, images, lively_model

SIZES = [(100, 150), (128, 131)]


@pytest.mark.parametrize("row", model_zoo.list_models())
def test_detections_are_those_of_the_model(row: str) -> None:
    _, model = lively_model(row)
    canvases = images(2, 128, 160, seed=1)
    expected = detect_eagerly(model, canvases, SIZES)
    with torch.no_grad():
        boxes, scores, classes, *masks = ExportableDetector(model)(canvases, torch.tensor(SIZES))
    for index, instances in enumerate(expected):
        number = len(instances)
        assert number > 5
        assert (classes[index, :number] >= 0).all() and (classes[index, number:] == -1).all()
        assert (scores[index, number:] == 0).all() and (boxes[index, number:] == 0).all()
        torch.testing.assert_close(scores[index, :number], instances.scores)
        torch.testing.assert_close(boxes[index, :number], instances.pred_boxes.tensor)
        assert torch.equal(classes[index, :number], instances.pred_classes)
        if masks:
            torch.testing.assert_close(masks[0][index, :number], instances.pred_masks[:, 0])
