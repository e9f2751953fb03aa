# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Test-time augmentation for all heads of dcn_d2, and the refusal of those that it cannot augment."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_model
from detectron2.structures import Instances
from torch import nn

from dcn_d2 import model_zoo
from dcn_d2.data.transforms import OpenCVResizeShortestEdge
from dcn_d2.engine import DCNTrainer
from dcn_d2.evaluation import build_augmented_model, check_augmentation
from dcn_d2.evaluation.augmentation import OpenCVDatasetMapperTTA

from ..slim import slim_config

ROWS = [
    ("faster_rcnn_R_50_FPN_1x_mdconv_c3-c5", ()),
    ("faster_rcnn_R_50_FPN_1x_dpool", ()),
    ("faster_rcnn_R_50_FPN_1x_mdpool", ()),
    ("faster_rcnn_R_50_FPN_1x_dpool", ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "DeformRoIPool")),
    ("faster_rcnn_R_50_FPN_1x_dpool", ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ModulatedDeformRoIPool")),
    ("mask_rcnn_R_50_FPN_1x_mdconv_c3-c5", ()),
    ("mask_rcnn_R_50_FPN_1x_mdconv_c3-c5", ("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "DeformRoIPool")),
    ("cascade_rcnn_R_50_FPN_1x_dconv_c3-c5", ("MODEL.DCN.CASCADE_AVERAGE_LOGITS", False)),
    ("cascade_rcnn_R_50_FPN_1x_dconv_c3-c5", ("MODEL.DCN.CASCADE_AVERAGE_LOGITS", True)),
    ("cascade_mask_rcnn_R_50_FPN_1x_dconv_c3-c5", ("MODEL.DCN.CASCADE_MASK_HEADS", True)),
]
HEIGHT, WIDTH = 72, 96


def config(row: str, *keys: Any) -> CfgNode:
    cfg = slim_config(model_zoo.get_config(row))
    cfg.merge_from_list(
        [
            *("MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.1, "SEED", 1),
            *("MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "BN", "TEST.AUG.ENABLED", True),
            *("INPUT.MIN_SIZE_TEST", 48, "TEST.AUG.MIN_SIZES", (48,), "TEST.AUG.FLIP", False),
            *("TEST.DETECTIONS_PER_IMAGE", 15, *keys),
        ]
    )
    check_augmentation(cfg)
    return cfg


def decided_model(cfg: CfgNode, seed: int) -> nn.Module:
    """A model with random weights whose scores and boxes differ from object to object."""
    torch.manual_seed(seed)
    model = build_model(cfg).eval()
    heads = model.roi_heads
    predictors = heads.box_predictor if isinstance(heads.box_predictor, nn.ModuleList) else [heads.box_predictor]

    def spread(layer: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        scale = output.std()
        layer.weight.data /= scale
        return output / scale

    layers = [layer for predictor in predictors for layer in (predictor.cls_score, predictor.bbox_pred)]
    for layer in layers:
        nn.init.normal_(layer.weight)
    marks = [layer.register_forward_hook(spread) for layer in layers]
    with torch.no_grad():
        model([image_dict(cfg, random_pixels(seed))])
    for mark in marks:
        mark.remove()
    return model


def image_dict(cfg: CfgNode, pixels: np.ndarray) -> dict[str, Any]:
    """What the loader for evaluation gives for an image."""
    from dcn_d2.data.transforms import build_augmentation

    (resize,) = build_augmentation(cfg, is_train=False)
    image = resize.get_transform(pixels).apply_image(pixels)
    height, width = pixels.shape[:2]
    return {"image": torch.from_numpy(image.transpose(2, 0, 1).copy()), "height": height, "width": width}


def random_pixels(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def sorted_by_score(found: Instances) -> Instances:
    found = found[found.pred_boxes.nonempty()]
    return found[found.scores.argsort(descending=True)]


def assert_same(found: Instances, expected: Instances, tolerance: float = 1e-3) -> None:
    found, expected = sorted_by_score(found), sorted_by_score(expected)
    assert len(found) == len(expected) > 3
    assert torch.allclose(found.scores, expected.scores, atol=tolerance)
    assert found.pred_classes.tolist() == expected.pred_classes.tolist()
    assert torch.allclose(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=100 * tolerance)
    assert found.has("pred_masks") == expected.has("pred_masks")
    if found.has("pred_masks"):
        assert (found.pred_masks != expected.pred_masks).float().mean() < 0.002


@pytest.mark.parametrize("row, keys, resize", [*((*row, "cv2") for row in ROWS), (*ROWS[0], "PIL"), (*ROWS[9], "PIL")])
def test_one_size_without_mirroring_gives_what_the_model_gives(row: str, keys: tuple, resize: str, seed: int) -> None:
    cfg = config(row, "INPUT.RESIZE_WITH", resize, *keys)
    model = decided_model(cfg, seed)
    sample = image_dict(cfg, random_pixels(seed))
    augmented = build_augmented_model(cfg, model)
    with torch.no_grad():
        expected = model([sample])[0]["instances"]
        found = augmented([sample])[0]["instances"]
    assert found.has("pred_masks") == cfg.MODEL.MASK_ON
    assert_same(found, expected)
    assert not augmented.training and not model.training, "as before"


@pytest.mark.parametrize("row, keys", [ROWS[0], ROWS[2], ROWS[5], ROWS[9]])
def test_mirrored_image_has_the_mirrored_result(row: str, keys: tuple, seed: int) -> None:
    # Both see the image and its mirror image. Without resizing these are the same pixels.
    cfg = config(row, "TEST.AUG.FLIP", True, "INPUT.MIN_SIZE_TEST", 0, "TEST.AUG.MIN_SIZES", (HEIGHT,), *keys)
    model, pixels = decided_model(cfg, seed), random_pixels(seed)
    augmented = build_augmented_model(cfg, model)
    with torch.no_grad():
        found = augmented([image_dict(cfg, pixels)])[0]["instances"]
        mirrored = augmented([image_dict(cfg, np.ascontiguousarray(pixels[:, ::-1]))])[0]["instances"]
        alone = model([image_dict(cfg, pixels)])[0]["instances"]
    boxes = mirrored.pred_boxes.tensor
    boxes[:, [0, 2]] = WIDTH - boxes[:, [2, 0]]
    if mirrored.has("pred_masks"):
        mirrored.pred_masks = mirrored.pred_masks.flip(2)
    assert_same(found, mirrored)
    scores = [sorted_by_score(one).scores for one in (found, alone)]
    assert scores[0].shape != scores[1].shape or not torch.allclose(*scores), "the mirror image had a say"


@pytest.mark.parametrize("channels", [1, 3])
def test_opencv_resizes_as_the_training_does(channels: int, seed: int) -> None:
    cfg = config(ROWS[0][0], "TEST.AUG.MIN_SIZES", (30, 60), "TEST.AUG.MAX_SIZE", 70, "TEST.AUG.FLIP", True)
    pixels = random_pixels(seed)[:, :, :channels]
    sample = image_dict(cfg, pixels) | {"image_id": 5}
    seen = OpenCVDatasetMapperTTA(cfg)(sample)
    given = sample["image"].permute(1, 2, 0).numpy()
    assert given.shape == (48, 64, channels), "what the loader has resized"
    sizes = [(30, 40), (30, 40), (53, 70), (53, 70)]
    assert [tuple(one["image"].shape[1:]) for one in seen] == sizes and all(one["image_id"] == 5 for one in seen)
    for index, one in enumerate(seen):
        height, width = sizes[index]
        expected = cv2.resize(given, (width, height), interpolation=cv2.INTER_LINEAR).reshape(height, width, channels)
        if index % 2:
            expected = expected[:, ::-1]
        assert np.array_equal(one["image"].permute(1, 2, 0).numpy(), expected)
        # The corner of the original image, there and back.
        corner = one["transforms"].apply_coords(np.array([[float(WIDTH), 0.0]]))
        assert corner[0].tolist() == pytest.approx([0.0 if index % 2 else width, 0.0])
        assert one["transforms"].inverse().apply_coords(corner)[0].tolist() == pytest.approx([WIDTH, 0.0])
    assert OpenCVResizeShortestEdge.get_output_shape(48, 64, 60, 70) == (53, 70)


@META_ARCH_REGISTRY.register()
class MyRCNN(GeneralizedRCNN):
    """An architecture of a user, whose `inference` may be anything."""


@pytest.mark.parametrize(
    "keys, message",
    [
        (["MODEL.KEYPOINT_ON", True], "does not work with MODEL.KEYPOINT_ON True"),
        (["MODEL.LOAD_PROPOSALS", True], "does not work with MODEL.LOAD_PROPOSALS True"),
        (["MODEL.META_ARCHITECTURE", "PanopticFPN"], "MODEL.META_ARCHITECTURE is PanopticFPN: test-time augmentation"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], "MODEL.META_ARCHITECTURE is RetinaNet"),
        (["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], "MODEL.META_ARCHITECTURE is SemanticSegmentor"),
        (["MODEL.META_ARCHITECTURE", "MyRCNN"], "MODEL.META_ARCHITECTURE is MyRCNN"),
        (["MODEL.ROI_HEADS.NAME", "RROIHeads"], "MODEL.ROI_HEADS.NAME is RROIHeads"),
        (["MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"], "MODEL.PROPOSAL_GENERATOR.NAME is RRPN"),
    ],
)
def test_models_that_cannot_be_augmented_are_refused(keys: list[Any], message: str) -> None:
    cfg = slim_config()
    cfg.merge_from_list(["TEST.AUG.ENABLED", True, "DATASETS.TEST", ("nuclei_val",), *keys])
    with pytest.raises(ValueError, match=f"TEST.AUG.ENABLED is True, but .*{message}"):
        check_augmentation(cfg)
    with pytest.raises(ValueError, match=message):
        DCNTrainer.test(cfg, nn.Identity())
    cfg.TEST.AUG.ENABLED = False
    check_augmentation(cfg)
