# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from dcn_d2.modeling import DCNRPN

from ...slim import slim_config

SHAPES = {f"p{level}": ShapeSpec(channels=8, stride=2**level) for level in range(2, 7)}
SIZES = [(60, 100), (96, 64)]  # of the two images; padded to multiples of 32: (64, 128) and (96, 64)


def make(kind: type[RPN] = DCNRPN, **dcn: object) -> RPN:
    cfg = slim_config()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[size] for size in (32, 64, 128, 256, 512)]
    cfg.MODEL.RPN.BOUNDARY_THRESH = dcn.pop("BOUNDARY_THRESH", -1)
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = dcn.pop("BATCH_SIZE_PER_IMAGE", 256)
    for key, value in dcn.items():
        cfg.MODEL.DCN[key] = value
    torch.manual_seed(0)
    return kind(cfg, SHAPES)


def inputs() -> tuple[ImageList, dict[str, torch.Tensor], list[Instances]]:
    """Two images of different sizes in a batch of 96 x 128, padded further to 128 x 128 for the strides."""
    torch.manual_seed(1)
    features = {name: torch.randn(2, 8, 128 // shape.stride, 128 // shape.stride) for name, shape in SHAPES.items()}
    truth = [[[3.0, 4, 50, 40], [60, 10, 98, 58]], [[0.0, 30, 12, 70]]]
    instances = [Instances(size, gt_boxes=Boxes(torch.tensor(boxes))) for size, boxes in zip(SIZES, truth)]
    return ImageList(torch.zeros(2, 3, 128, 128), SIZES), features, instances


def label(rpn: RPN) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    _, features, instances = inputs()
    anchors = rpn.anchor_generator(list(features.values()))
    return Boxes.cat(anchors).tensor, *rpn.label_and_sample_anchors(anchors, instances)


def losses(rpn: RPN) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    with EventStorage():
        return rpn(*inputs())[1]


def test_defaults_are_detectron2() -> None:
    theirs, mine = losses(make(RPN)), losses(make())
    assert theirs.keys() == mine.keys()
    for name in theirs:
        assert torch.equal(theirs[name], mine[name])
    mine, theirs = make(), make(RPN)
    assert type(mine.anchor_matcher) is type(theirs.anchor_matcher)


def test_anchors_in_the_padding_do_not_take_part() -> None:
    anchors, labels, boxes = label(make(RPN_PADDING_DIVISOR=32, BATCH_SIZE_PER_IMAGE=100_000))
    x, y = ((anchors[:, :2] + anchors[:, 2:]) / 2).unbind(1)
    for image, (height, width) in enumerate([(64, 128), (96, 64)]):
        inside = (x < width - 1) & (y < height - 1)
        assert 0 < inside.sum() < len(anchors)
        assert (labels[image][~inside] == -1).all() and (labels[image][inside] != -1).any()
    # Those that take part are labelled as without the key.
    _, plain, plain_boxes = label(make(BATCH_SIZE_PER_IMAGE=100_000))
    positive = labels[0] == 1
    assert positive.any() and torch.equal(positive, plain[0] == 1)
    torch.testing.assert_close(boxes[0][positive], plain_boxes[0][positive])


@pytest.mark.parametrize("divisor, positive", [(0, False), (32, True)])
def test_ground_truth_is_matched_among_the_anchors_inside(divisor: int, positive: bool) -> None:
    # The best anchors of the second image's box, 22 wide with their centre 8 pixels from the left border, cross it.
    rpn = make(BOUNDARY_THRESH=0, RPN_PADDING_DIVISOR=divisor, RPN_LOW_QUALITY_IOU=0.1, BATCH_SIZE_PER_IMAGE=100_000)
    anchors, labels, _ = label(rpn)
    crosses = (anchors[:, :2] < 0).any(dim=1) | (anchors[:, 2] >= 64) | (anchors[:, 3] >= 96)
    assert (labels[1][crosses] == -1).all()
    assert (labels[1] == 1).any() == positive


@pytest.mark.parametrize("minimum, is_minimum", [(0.3, True), (-1.0, False)])
def test_matcher_follows_the_key(minimum: float, is_minimum: bool) -> None:
    matcher = make(RPN_LOW_QUALITY_IOU=minimum).anchor_matcher
    assert (getattr(matcher, "low_quality_iou", None) == minimum) == is_minimum
    assert matcher.allow_low_quality_matches != is_minimum


def test_losses_are_averages_over_the_samples() -> None:
    # Far more wanted than there are: Detectron2 divides by what is wanted.
    wanted = 100_000
    plain = losses(make(BATCH_SIZE_PER_IMAGE=wanted))
    mine = losses(make(BATCH_SIZE_PER_IMAGE=wanted, RPN_LOSS_PER_SAMPLE=True))
    _, labels, _ = label(make(BATCH_SIZE_PER_IMAGE=wanted))
    samples = sum((one_image >= 0).sum() for one_image in labels)
    assert all((one_image == kind).any() for one_image in labels for kind in (0, 1))
    for name in plain:
        torch.testing.assert_close(mine[name], plain[name] * 2 * wanted / samples)


def test_image_without_positives_counts_as_one_in_the_average() -> None:
    rpn = make(BATCH_SIZE_PER_IMAGE=8, RPN_LOSS_PER_SAMPLE=True)
    labels = [torch.tensor([0, 0, 0, -1])]
    anchors = [Boxes(torch.tensor([[0.0, 0, 4, 4]] * 4))]
    logits, deltas = [torch.zeros(1, 4)], [torch.zeros(1, 4, 4)]
    with EventStorage():
        loss = rpn.losses(anchors, logits, labels, deltas, [anchors[0].tensor])["loss_rpn_cls"]
    torch.testing.assert_close(loss, 3 * torch.tensor(2.0).log() / (3 + 1))
