# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from dcn_d2 import model_zoo
from dcn_d2.checkpoint import convert_mmdet_state_dict, to_mmdet
from dcn_d2.checkpoint.mmdet import has_v1_layout, is_mmdet_detector, unwrap_state_dict

from .layouts import FACTS, digest, published_layout, zeros

FASTER, MASK = "faster_rcnn_R_50_FPN_1x_dconv_c3-c5", "mask_rcnn_R_50_FPN_1x_mdconv_c3-c5"
CASCADE = "cascade_mask_rcnn_R_50_FPN_1x_dconv_c3-c5"
StateDict = dict[str, Any]


def numbered(row: str) -> StateDict:
    """A state dict of a row whose values are the indices of the first dimension; the others are cut to 1."""
    shapes = {name: shape or (1,) for name, shape in published_layout(row).items()}
    return {
        name: np.arange(size, dtype=np.float32).reshape(size, *[1] * len(rest))
        for name, (size, *rest) in shapes.items()
    }


def as_v1(weights: StateDict) -> StateDict:
    """The same model as MMDetection 1.x stores it: no "roi_head.", background first, boxes and masks for it too.

    The rows that only 1.x has hold -1.
    """
    old = {}
    for name, value in weights.items():
        kind = name.split(".")[-2]
        if kind == "fc_cls":
            value = np.concatenate([value[-1:], value[:-1]])
        elif kind == "conv_logits" or (kind == "fc_reg" and value.shape[0] != 4):
            value = np.concatenate([np.full_like(value[: 4 if kind == "fc_reg" else 1], -1), value])
        old[name.removeprefix("roi_head.")] = value
    return old


def assert_same(found: StateDict, expected: StateDict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if found[name] is not value:
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("row", FACTS)
def test_layouts_are_the_published_ones(row: str) -> None:
    layout = published_layout(row)
    assert (len(layout), digest(layout)) == FACTS[row]


@pytest.mark.parametrize("row", model_zoo.list_models())
def test_names_and_shapes_become_those_of_the_model(row: str) -> None:
    cfg = model_zoo.get_config(row)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    # Norms with fixed statistics have a counter too, which the conversion leaves out.
    expected = {name: value.shape for name, value in model.state_dict().items() if "num_batches_tracked" not in name}
    converted = convert_mmdet_state_dict(zeros(published_layout(row)))
    assert {name: value.shape for name, value in converted.items()} == expected


@pytest.mark.parametrize("row", FACTS)
def test_there_and_back_is_the_same(row: str) -> None:
    theirs = zeros(published_layout(row))
    assert is_mmdet_detector(theirs) and not has_v1_layout(theirs)
    mine = convert_mmdet_state_dict(theirs, keep_num_batches_tracked=True)
    assert len(mine) == len(theirs) and not is_mmdet_detector(mine)
    back = to_mmdet(mine)
    assert back.keys() == theirs.keys()
    assert all(back[name] is value for name, value in theirs.items())


# Written out by hand: one name of each kind.
PAIRS = {
    "backbone.conv1.weight": "backbone.bottom_up.stem.conv1.weight",
    "backbone.bn1.running_var": "backbone.bottom_up.stem.conv1.norm.running_var",
    "backbone.layer1.0.downsample.0.weight": "backbone.bottom_up.res2.0.shortcut.weight",
    "backbone.layer1.0.downsample.1.bias": "backbone.bottom_up.res2.0.shortcut.norm.bias",
    "backbone.layer3.22.conv2.weight": "backbone.bottom_up.res4.22.conv2.weight",
    "backbone.layer3.22.conv2.conv_offset.bias": "backbone.bottom_up.res4.22.conv2_offset.bias",
    "backbone.layer4.2.bn3.running_mean": "backbone.bottom_up.res5.2.conv3.norm.running_mean",
    "neck.lateral_convs.0.conv.weight": "backbone.fpn_lateral2.weight",
    "neck.fpn_convs.3.conv.bias": "backbone.fpn_output5.bias",
    "rpn_head.rpn_conv.weight": "proposal_generator.rpn_head.conv.weight",
    "rpn_head.rpn_cls.bias": "proposal_generator.rpn_head.objectness_logits.bias",
    "rpn_head.rpn_reg.weight": "proposal_generator.rpn_head.anchor_deltas.weight",
    "roi_head.bbox_head.2.shared_fcs.1.weight": "roi_heads.box_head.2.fc2.weight",
    "roi_head.bbox_head.0.fc_cls.weight": "roi_heads.box_predictor.0.cls_score.weight",
    "roi_head.bbox_head.1.fc_reg.bias": "roi_heads.box_predictor.1.bbox_pred.bias",
    "roi_head.mask_head.1.convs.3.conv.weight": "roi_heads.mask_head.1.mask_fcn4.weight",
    "roi_head.mask_head.2.upsample.bias": "roi_heads.mask_head.2.deconv.bias",
    "roi_head.mask_head.0.conv_logits.weight": "roi_heads.mask_head.0.predictor.weight",
}
EXTRACTOR = "roi_head.bbox_roi_extractor.roi_layers"
POOLING = {
    f"{EXTRACTOR}.0.offset_fc.4.bias": "roi_heads.box_pooler.level_poolers.0.offset_fc.4.bias",
    f"{EXTRACTOR}.3.mask_fc.2.weight": "roi_heads.box_pooler.level_poolers.3.mask_fc.2.weight",
    "roi_head.bbox_head.shared_fcs.0.bias": "roi_heads.box_head.fc1.bias",
    "roi_head.bbox_head.fc_cls.bias": "roi_heads.box_predictor.cls_score.bias",
    "roi_head.bbox_head.fc_reg.weight": "roi_heads.box_predictor.bbox_pred.weight",
}


@pytest.mark.parametrize(
    "row, pairs",
    [("cascade_mask_rcnn_R_101_FPN_1x_dconv_c3-c5", PAIRS), ("faster_rcnn_R_50_FPN_1x_mdpool", POOLING)],
)
def test_each_kind_of_name(row: str, pairs: dict[str, str]) -> None:
    theirs = zeros(published_layout(row))
    mine = convert_mmdet_state_dict(theirs)
    for name, new_name in pairs.items():
        assert mine[new_name] is theirs[name]


def test_offset_branch_has_two_names() -> None:
    new = zeros(published_layout(FASTER))
    old = {name.replace("conv2.conv_offset.", "conv2_offset."): value for name, value in new.items()}
    assert "backbone.layer2.0.conv2_offset.weight" in old
    assert_same(convert_mmdet_state_dict(old), convert_mmdet_state_dict(new))


@pytest.mark.parametrize("row", [FASTER, MASK, CASCADE, "faster_rcnn_R_50_FPN_1x_mdpool"])
@pytest.mark.parametrize("tensors", [False, True])
def test_layout_of_version_1_is_recognised(row: str, tensors: bool) -> None:
    new = numbered(row)
    old = as_v1(new)
    assert has_v1_layout(old) and is_mmdet_detector(old)
    if tensors:
        old = {name: torch.tensor(value) for name, value in old.items()}
    assert_same(convert_mmdet_state_dict(old), convert_mmdet_state_dict(new))


def test_classes_are_recognised_by_shape_under_either_prefix() -> None:
    new, old = numbered(MASK), as_v1(numbered(MASK))
    expected = convert_mmdet_state_dict(new)
    heads = ("bbox_head", "mask_head")
    moved = {f"roi_head.{name}" if name.startswith(heads) else name: value for name, value in old.items()}
    assert_same(convert_mmdet_state_dict(moved), expected)
    assert_same(convert_mmdet_state_dict({k.removeprefix("roi_head."): v for k, v in new.items()}), expected)


@pytest.mark.parametrize("row", [MASK, CASCADE])
def test_one_class_besides_the_background(row: str) -> None:
    """Shared boxes, and the boxes and masks of a single class, have the same shape."""
    new = {}
    for name, value in numbered(row).items():
        rows = {"fc_cls": 2, "fc_reg": 4, "conv_logits": 1}.get(name.split(".")[-2])
        new[name] = value[:rows] if rows else value
    assert_same(convert_mmdet_state_dict(as_v1(new)), convert_mmdet_state_dict(new))


def test_heads_that_disagree_about_the_background_are_refused() -> None:
    weights = zeros(published_layout(MASK))
    weights["roi_head.mask_head.conv_logits.weight"] = np.zeros((81, 256, 1, 1))
    with pytest.raises(
        ValueError, match=r"conv_logits.weight \[81, 256, 1, 1\] have a row .*fc_reg.weight \[320, 1024"
    ):
        convert_mmdet_state_dict(weights)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"meta": {"epoch": 12}, "state_dict": weights, "optimizer": {"state": {}}},
        lambda weights: {"model": weights, "iteration": 3},
        lambda weights: {f"module.{name}": value for name, value in weights.items()},
        lambda weights: {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
        lambda weights: weights | {"ema_" + name.replace(".", "_"): value for name, value in weights.items()},
        lambda weights: weights | {"data_preprocessor.mean": np.zeros(3), "data_preprocessor.std": np.zeros(3)},
        lambda weights: {"state_dict": weights, "ema_state_dict": {f"module.{name}": 0 for name in weights}},
    ],
    ids=["mmdet 2", "detectron2", "distributed", "both", "mmcv's EMA", "preprocessor", "mmengine's EMA"],
)
def test_what_training_leaves_is_taken_off(wrap: Any) -> None:
    weights = zeros(published_layout(FASTER))
    assert is_mmdet_detector(wrap(weights))
    assert_same(convert_mmdet_state_dict(wrap(weights)), convert_mmdet_state_dict(weights))


def test_unwrapping_leaves_a_plain_state_dict_alone() -> None:
    weights = {"module.a": 1, "b": 2}
    assert unwrap_state_dict(weights) is weights
    assert unwrap_state_dict({}) == {}


def test_everything_that_is_wrong_is_listed() -> None:
    weights = zeros(published_layout(FASTER))
    weights |= {
        "roi_head.shared_head.layer4.0.conv1.weight": np.zeros(1),
        "backbone.layer2.0.conv2_offset.weight": np.zeros(1),
        "neck.fpn_convs.0.gn.weight": np.zeros(1),
        "rpn_head.rpn_conv.scale": np.zeros(1),
        "neck.lateral_convs.4.conv.bias": 7,
    }
    del weights["backbone.layer1.0.downsample.1.running_var"], weights["backbone.bn1.running_mean"]
    with pytest.raises(ValueError) as error:
        convert_mmdet_state_dict(weights)
    assert str(error.value).splitlines()[1:] == [
        "  roi_head.shared_head.layer4.0.conv1.weight is unknown",
        "  backbone.layer2.0.conv2.conv_offset.weight and backbone.layer2.0.conv2_offset.weight both become "
        "backbone.bottom_up.res3.0.conv2_offset.weight",
        "  neck.fpn_convs.0.gn.weight is unknown",
        "  rpn_head.rpn_conv.scale is unknown",
        "  neck.lateral_convs.4.conv.bias is of type int, not a tensor",
        "  backbone.bn1.running_mean is missing",
        "  backbone.layer1.0.downsample.1.running_var is missing",
    ]
    with pytest.raises(ValueError, match="roi_heads.keypoint_head.a.weight is unknown"):
        to_mmdet({"roi_heads.keypoint_head.a.weight": np.zeros(1)})
    with pytest.raises(ValueError, match="backbone.fpn_lateral1.weight is unknown"):
        to_mmdet({"backbone.fpn_lateral1.weight": np.zeros(1)})


def test_buffers_of_detectron2_stay_here() -> None:
    weights = convert_mmdet_state_dict(zeros(published_layout(FASTER)))
    extra = {"pixel_mean": 0, "pixel_std": 0, "proposal_generator.anchor_generator.cell_anchors.0": 0}
    assert to_mmdet(weights | extra).keys() == to_mmdet(weights).keys()


def test_needs_neither_torch_nor_detectron2() -> None:
    code = (
        "import sys, numpy; sys.modules['torch'] = sys.modules['detectron2'] = None; "
        "from dcn_d2.checkpoint import mmdet, torchvision; "
        "print(mmdet.convert_mmdet_state_dict({'rpn_head.rpn_cls.bias': numpy.zeros(3)}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "proposal_generator.rpn_head.objectness_logits.bias" in done.stdout, done.stderr
