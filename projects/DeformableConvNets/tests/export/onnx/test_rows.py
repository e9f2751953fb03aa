# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime finds what Detectron2 finds, for all rows of the zoo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from torch import Tensor

from dcn_d2 import model_zoo
from dcn_d2.export.onnx import Session
from dcn_d2.export.shapes import BATCH, HEIGHT, WIDTH

from ..models import detect_eagerly, images
from .conftest import Write

MASK_ROW = "mask_rcnn_R_50_FPN_1x_mdconv_c3-c5"
# Each of the others takes 20 to 60 seconds, and differs from these in what the tests of operators and of
# ExportableDetector have too.
FAST = ["faster_rcnn_R_50_FPN_1x_mdconv_c3-c5_group4", MASK_ROW]
ROWS = [row if row in FAST else pytest.param(row, marks=pytest.mark.slow) for row in model_zoo.list_models()]
# A ResNet-101 has more blocks like those of a ResNet-50. The exporter would take twice as long for it.
SHORT = ("MODEL.RESNETS.DEPTH", 50)
# Batches of canvases and of the images in them. One image has no pixels, and so no proposals and no detections.
BATCHES = [
    (images(2, 128, 160, seed=1), [(100, 150), (128, 131)]),
    (images(1, 192, 96, seed=2), [(190, 90)]),
    (images(3, 64, 64, seed=3), [(64, 50), (0, 0), (40, 64)]),
]


def run(session: Session, canvases: Tensor, sizes: Sequence[tuple[int, int]], *more: Tensor) -> list[dict[str, Any]]:
    """Gives the results of each image."""
    values = [canvases, torch.tensor(sizes), *more]
    inputs = {tensor.name: value.numpy() for tensor, value in zip(session.description.inputs, values)}
    results = session.run(inputs)
    return [{name: result[index] for name, result in results.items()} for index in range(len(sizes))]


def check(found: dict[str, Any], expected: Instances) -> None:
    """Each expected detection has a partner among those found, and there are no others."""
    number = len(expected)
    classes = expected.pred_classes.numpy()
    assert (found["classes"] >= 0).sum() == number and (found["classes"][number:] == -1).all()
    assert (found["scores"][number:] == 0).all() and (found["boxes"][number:] == 0).all()
    assert (np.diff(found["scores"]) <= 0).all()
    distance = np.abs(found["boxes"][:number, None] - expected.pred_boxes.tensor.numpy()).max(-1)
    distance[found["classes"][:number, None] != classes] = np.inf
    distance[np.abs(found["scores"][:number, None] - expected.scores.numpy()) > 1e-4] = np.inf
    for index in range(number):  # of the expected one
        partner = distance[:, index].argmin()
        assert distance[partner, index] < 1e-2, (index, distance[partner, index])
        distance[partner] = np.inf  # taken
        if "masks" in found:
            masks = [torch.as_tensor(found["masks"][partner]), expected.pred_masks[index].squeeze(0)]
            differ = (masks[0] >= 0.5) != (masks[1] >= 0.5)
            assert differ.float().mean() <= 1e-4


@pytest.mark.parametrize("row", ROWS)
def test_detections_are_those_of_detectron2(row: str, written: Write) -> None:
    model, path, description = written(row, opts=SHORT)
    session = Session(path, threads=1)
    assert session.description == description
    found = 0
    for canvases, sizes in BATCHES:
        expected = detect_eagerly(model, canvases, sizes)
        for result, instances, size in zip(run(session, canvases, sizes), expected, sizes):
            check(result, instances)
            assert (len(instances) > 5) == (size != (0, 0))
            found += len(instances)
    assert found > 100


def test_free_sizes_have_names_and_the_file_says_what_it_is(written: Write) -> None:
    import onnx

    _, path, description = written(MASK_ROW, opts=SHORT)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert shapes == {
        "images": [BATCH, 3, HEIGHT, WIDTH],
        "image_sizes": [BATCH, 2],
        "boxes": [BATCH, 100, 4],
        "scores": [BATCH, 100],
        "classes": [BATCH, 100],
        "masks": [BATCH, 100, 28, 28],
    }
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 19)]
    assert not model.functions and not any(node.domain for node in model.graph.node)
    assert model.producer_name == "dcn_d2" and description.row in model.doc_string
    metadata = {each.key: each.value for each in model.metadata_props}
    assert metadata == {"dcn_d2": description.to_json(), "class_names": '["cat", "dog"]'}


def test_the_file_tells_nothing_of_the_machine(written: Write) -> None:
    import dcn_d2

    content = written(MASK_ROW, opts=SHORT).path.read_bytes()
    folder = str(dcn_d2.__path__[0]).encode()
    assert folder not in content and b".py" not in content


def test_values_that_are_equal_are_stored_once(written: Write) -> None:
    model, path, _ = written(MASK_ROW, opts=SHORT)
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert path.stat().st_size < weights + 300_000


@pytest.mark.slow
def test_masks_pasted_into_images(written: Write) -> None:
    model, path, _ = written(MASK_ROW, masks="pasted", opts=SHORT)
    session = Session(path, threads=1)
    for (canvases, sizes), (height, width) in zip(BATCHES[:2], [(77, 99), (201, 50)]):
        expected = detect_eagerly(model, canvases, sizes)
        results = run(session, canvases, sizes, torch.tensor([height, width]))
        for result, instances, size in zip(results, expected, sizes):
            instances._image_size = size
            check(result, detector_postprocess(instances, height, width))


@pytest.mark.slow
def test_no_masks_and_no_detections(written: Write) -> None:
    nothing = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.99999)
    _, path, _ = written(MASK_ROW, masks="none", opts=(*SHORT, *nothing))
    session = Session(path, threads=1)
    for canvases, sizes in BATCHES:
        for result in run(session, canvases, sizes):
            assert list(result) == ["boxes", "scores", "classes"]
            assert (result["classes"] == -1).all() and not result["boxes"].any() and not result["scores"].any()


@pytest.mark.slow
def test_a_fixed_size_and_batch(written: Write) -> None:
    model, path, _ = written(MASK_ROW, opts=SHORT, size=(128, 160), batch=2)
    session = Session(path, threads=1)
    (canvases, sizes), other = BATCHES[0], BATCHES[1]
    for result, instances in zip(run(session, canvases, sizes), detect_eagerly(model, canvases, sizes)):
        check(result, instances)
    with pytest.raises(Exception, match="Got: 1 Expected: 2"):
        run(session, *other)


def test_the_backbone_alone(written: Write) -> None:
    model, path, description = written(FAST[0], opts=SHORT, part="backbone")
    session = Session(path, threads=1)
    assert [tensor.name for tensor in description.outputs] == ["p2", "p3", "p4", "p5", "p6"]
    for canvases, sizes in BATCHES:
        normalised = (canvases - model.pixel_mean) / model.pixel_std
        for image, (height, width) in zip(normalised, sizes):
            image[:, height:] = 0
            image[:, :, width:] = 0
        with torch.no_grad():
            expected = model.backbone(normalised)
        inputs = {"images": canvases.numpy(), "image_sizes": torch.tensor(sizes).numpy()}
        for name, result in session.run(inputs).items():
            torch.testing.assert_close(torch.from_numpy(result), expected[name], rtol=1e-4, atol=1e-3)
