# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""An exported model gives what the model gives that was exported, however images are put together."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances

from dcn_d2.export.detector import ExportableDetector
from dcn_d2.export.model import ExportedModel, open_model

from .models import detect_eagerly, lively_model
from .sessions import TorchSession, describe

ROW = "mask_rcnn_R_50_FPN_1x_mdconv_c3-c5"
# Of the images as the model sees them, and of the results: portrait and landscape, with and without resizing.
SIZES = [((60, 90), (120, 180)), ((90, 60), (180, 120)), ((64, 50), (64, 50))]


@pytest.fixture(scope="module")
def lively() -> tuple[Any, Any]:
    return lively_model(ROW, opts=["TEST.DETECTIONS_PER_IMAGE", 20])


def exported(lively: tuple[Any, Any], masks: str = "boxes", **description: Any) -> tuple[ExportedModel, TorchSession]:
    cfg, model = lively
    module = ExportableDetector(model, masks)
    session = TorchSession(module, describe(cfg, module, **description))
    return ExportedModel(session), session


def inputs(sizes: Sequence[tuple[tuple[int, int], tuple[int, int]]] = SIZES) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"image": torch.randint(0, 256, (3, *size), generator=generator).float(), "height": height, "width": width}
        for size, (height, width) in sizes
    ]


def detect(model: Any, given: Sequence[dict[str, Any]], canvas: tuple[int, int]) -> list[dict[str, Instances]]:
    """What Detectron2 finds in images that share a batch. In another one, sums are rounded in another way."""
    sizes = [tuple(each["image"].shape[1:]) for each in given]
    canvases = torch.zeros(len(given), 3, *canvas)
    for place, each, (height, width) in zip(canvases, given, sizes):
        place[:, :height, :width] = each["image"]
    found = detect_eagerly(model, canvases, sizes)
    return [
        {"instances": detector_postprocess(instances, each["height"], each["width"])}
        for instances, each in zip(found, given)
    ]


def check_equal(found: dict[str, Instances], expected: dict[str, Instances]) -> int:
    ours, theirs = found["instances"], expected["instances"]
    assert ours.image_size == theirs.image_size and ours.get_fields().keys() == theirs.get_fields().keys()
    assert torch.equal(ours.pred_classes, theirs.pred_classes)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor, rtol=0, atol=1e-2)
    if theirs.has("pred_masks"):
        assert ours.pred_masks.dtype == torch.bool and ours.pred_masks.shape == theirs.pred_masks.shape
        assert float((ours.pred_masks != theirs.pred_masks).float().mean()) < 1e-4
    return len(theirs)


@pytest.mark.parametrize("masks", ["boxes", "pasted"])
@pytest.mark.parametrize("batch", [None, 1, 2])
def test_a_list_of_images_gives_what_the_model_gives(lively: tuple[Any, Any], masks: str, batch: int | None) -> None:
    model, session = exported(lively, masks, batch=batch)
    images = inputs()
    # What shares a batch: the last one is filled up, and pasted masks have one size.
    batches = {None: [[0, 1, 2]], 1: [[0], [1], [2]], 2: [[0, 1], [2, 2]]}[batch]
    if masks == "pasted":
        batches = [[number] * (batch or 1) for number in range(3)]
    # All have one canvas, which is Detectron2's, for the largest sides.
    expected = [detect(lively[1], [images[number] for number in numbers], (96, 96)) for numbers in batches]
    firsts = {number: each for numbers, found in zip(batches, expected) for number, each in zip(numbers, found)}
    found = model(images)
    assert sum(check_equal(each, firsts[number]) for number, each in enumerate(found)) > 20
    assert session.shapes == [(len(numbers), 3, 96, 96) for numbers in batches]


def test_one_batch_is_detectron2s(lively: tuple[Any, Any]) -> None:
    model, _ = exported(lively)
    with torch.no_grad():
        expected = lively[1](inputs())
    assert sum(check_equal(*pair) for pair in zip(model(inputs()), expected, strict=True)) > 20


def test_images_of_one_output_size_share_a_batch_if_masks_are_pasted(lively: tuple[Any, Any]) -> None:
    sizes = [((64, 96), (128, 192)), ((96, 64), (192, 128))] * 2
    model, session = exported(lively, "pasted", batch=2)
    images = inputs(sizes)
    expected = [detect(lively[1], images[start::2], (96, 96)) for start in (0, 1)]
    for found, theirs in zip(model(images), itertools.chain(*zip(*expected)), strict=True):
        check_equal(found, theirs)
    assert session.shapes == [(2, 3, 96, 96)] * 2


def test_without_masks_there_are_none(lively: tuple[Any, Any]) -> None:
    model, _ = exported(lively, "none")
    (found,) = model(inputs(SIZES[:1]))
    assert set(found["instances"].get_fields()) == {"pred_boxes", "scores", "pred_classes"}
    assert len(found["instances"]) > 5


@pytest.mark.parametrize("masks", ["boxes", "pasted"])
def test_nothing_found_is_no_instance(lively: tuple[Any, Any], masks: str) -> None:
    model, session = exported(lively, masks)
    predictor = session.module.roi_heads.box_predictor
    threshold, predictor.test_score_thresh = predictor.test_score_thresh, 1.0
    try:
        (found,) = model(inputs(SIZES[:1]))
    finally:
        predictor.test_score_thresh = threshold
    assert len(found["instances"]) == 0 and found["instances"].pred_boxes.tensor.shape == (0, 4)
    assert found["instances"].pred_masks.shape == (0, 120, 180) and found["instances"].pred_classes.shape == (0,)
    assert model([]) == []


def test_a_fixed_size_is_the_canvas(lively: tuple[Any, Any]) -> None:
    model, session = exported(lively, size=(96, 128), batch=2)
    expected = detect(lively[1], inputs(SIZES[:2]), (96, 128))
    assert sum(check_equal(*pair) for pair in zip(model(inputs(SIZES[:2])), expected, strict=True)) > 10
    model(inputs(SIZES[2:3]))
    assert session.shapes == [(2, 3, 96, 128)] * 2
    with pytest.raises(ValueError, match=r"an image of 90 x 140 pixels .* does not fit .* 96 x 128: resize it"):
        model(inputs([((64, 96), (64, 96)), ((90, 140), (100, 170))]))


def test_grey_images_have_the_channels_of_the_model(lively: tuple[Any, Any]) -> None:
    model, _ = exported(lively)
    grey = inputs(SIZES[:1])
    grey[0]["image"] = grey[0]["image"][:1]
    with torch.no_grad():
        expected = lively[1](grey)
    check_equal(model(grey)[0], expected[0])
    grey[0]["image"] = grey[0]["image"].expand(2, -1, -1)
    with pytest.raises(ValueError, match=r"an image has 2 channels, but the exported model takes 3 \(RGB\)"):
        model(grey)


def test_images_may_be_bytes_and_need_no_output_size(lively: tuple[Any, Any]) -> None:
    model, _ = exported(lively)
    image = inputs(SIZES[2:3])[0]["image"]
    check_equal(model([{"image": image.byte()}])[0], model(inputs(SIZES[2:3]))[0])


def test_a_negative_number_of_threads_was_an_error_of_the_runtime() -> None:
    with pytest.raises(ValueError, match="threads is -1"):
        open_model("model.onnx", threads=-1)


def test_several_threads_call_it_at_once(lively: tuple[Any, Any]) -> None:
    model, _ = exported(lively, batch=2)
    given = [inputs(list(sizes)) for sizes in itertools.permutations(SIZES, 2)]
    expected = [model(each) for each in given]
    found: list[Any] = [None] * len(given)

    def run(number: int) -> None:
        found[number] = model(given[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected):
        assert all(check_equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_mixed_precision_of_the_caller_changes_nothing(lively: tuple[Any, Any]) -> None:
    model, _ = exported(lively)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(inputs())
    assert all(check_equal(*pair) for pair in zip(found, model(inputs()), strict=True))


def test_a_backbone_detects_nothing(lively: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="the file holds the backbone of a model, which detects nothing"):
        exported(lively, part="backbone")


def test_copies_share_the_session(lively: tuple[Any, Any]) -> None:
    model, session = exported(lively)
    copy.deepcopy(model)(inputs(SIZES[:1]))
    assert len(session.shapes) == 1
    with pytest.raises(TypeError, match="an ExportedModel without a path cannot be pickled"):
        copy.copy(model)
