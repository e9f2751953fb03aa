# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, ROIHeads
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from dcn_d2.modeling import DCNROIPooler, MaskHeadPerStage, MinimumIoUMatcher

from ..slim import slim_config

SHAPES = {f"p{level}": ShapeSpec(channels=16, stride=2**level) for level in range(2, 6)}
SIZE = (96, 128)
TRUTH = [[8.0, 10, 60, 70], [50, 20, 120, 90]]
CLASSES = 3
TRAIN = dict(CASCADE_RESAMPLE=True, CASCADE_LOSS_WEIGHTS=(1.0, 0.5, 0.25), CASCADE_SCALE_GRADIENTS=False)


def make(name: str = "DCNCascadeROIHeads", masks: bool = False, **dcn: object) -> ROIHeads:
    cfg = slim_config()
    cfg.MODEL.MASK_ON = masks
    cfg.MODEL.ROI_MASK_HEAD.NAME, cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = "MaskRCNNConvUpsampleHead", 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 8, 16
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = "Cascade" in name
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = CLASSES
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.DCN.POOLER_FC_DIM = 8
    for key, value in dcn.items():
        cfg.MODEL.DCN[key] = value
    torch.manual_seed(0)
    heads = ROI_HEADS_REGISTRY.get(name)(cfg, SHAPES)
    for parameter in heads.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return heads


def features() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        name: torch.randn(2, 16, SIZE[0] // shape.stride, SIZE[1] // shape.stride, requires_grad=True)
        for name, shape in SHAPES.items()
    }


def proposals(count: int = 40) -> list[Instances]:
    """Boxes around the ground truth, from near to far."""
    torch.manual_seed(2)
    truth = torch.tensor(TRUTH).repeat(count // 2, 1)
    noise = torch.randn(2, count, 4) * torch.linspace(0, 40, count)[:, None]
    found = []
    for boxes in (truth + noise).unbind():
        corners = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], 1)
        one_image = Instances(SIZE, proposal_boxes=Boxes(corners), objectness_logits=torch.zeros(count))
        one_image.proposal_boxes.clip(SIZE)
        found.append(one_image)
    return found


def targets() -> list[Instances]:
    """The same two objects in both images."""
    masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, TRUTH):
        mask[int(y0) : int(y1), int(x0) : int(x1) - 10] = True
    return [
        Instances(SIZE, gt_boxes=Boxes(torch.tensor(TRUTH)), gt_classes=torch.tensor([0, 2]), gt_masks=BitMasks(masks))
        for _ in range(2)
    ]


def losses(heads: ROIHeads, maps: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    images = ImageList(torch.zeros(2, 3, *SIZE), [SIZE, SIZE])
    inputs = maps or features(), proposals()
    torch.manual_seed(3)  # for the sampling
    with EventStorage():
        return heads(images, *inputs, targets())[1]


def detect(heads: ROIHeads) -> list[Instances]:
    with torch.no_grad():
        return heads.eval()(ImageList(torch.zeros(2, 3, *SIZE), [SIZE, SIZE]), features(), proposals())[0]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("name", ["StandardROIHeads", "CascadeROIHeads"])
class TestDefaultsAreDetectron2:
    @pytest.fixture
    def pair(self, name: str, masks: bool) -> tuple[ROIHeads, ROIHeads]:
        mine = make({"StandardROIHeads": "DCNROIHeads", "CascadeROIHeads": "DCNCascadeROIHeads"}[name], masks)
        theirs = make(name, masks)
        theirs.load_state_dict(mine.state_dict(), strict=True)
        return mine, theirs

    def test_losses_and_gradients(self, pair: tuple[ROIHeads, ROIHeads]) -> None:
        values, gradients = [], []
        for heads in pair:
            values.append(losses(heads))
            sum(values[-1].values()).backward()
            gradients.append([parameter.grad for parameter in heads.parameters()])
        assert values[0].keys() == values[1].keys()
        assert all(torch.equal(values[0][key], values[1][key]) for key in values[0])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients))

    def test_detections(self, pair: tuple[ROIHeads, ROIHeads]) -> None:
        for mine, theirs in zip(*map(detect, pair)):
            assert len(mine) == len(theirs) > 0
            assert mine.get_fields().keys() == theirs.get_fields().keys()
            assert torch.equal(mine.pred_boxes.tensor, theirs.pred_boxes.tensor)
            assert torch.equal(mine.scores, theirs.scores)


@pytest.mark.parametrize("name", ["DCNROIHeads", "DCNCascadeROIHeads"])
def test_pooler_is_what_the_config_names(name: str) -> None:
    cfg = slim_config()
    cfg.MODEL.MASK_ON, cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True, True
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ModulatedDeformPSRoIPool"
    cfg.MODEL.DCN.POOLER_FC_DIM = 8
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    before = cfg.dump()
    heads = ROI_HEADS_REGISTRY.get(name)(cfg, SHAPES)
    assert cfg.dump() == before
    assert "box_pooler.level_poolers.3.mask_fc.2.weight" in heads.state_dict()
    assert not any(key.startswith("mask_pooler") for key in heads.state_dict())
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE, cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = "ROIAlignV2", "DeformRoIPool"
    heads = ROI_HEADS_REGISTRY.get(name)(cfg, SHAPES)
    assert any(key.startswith("mask_pooler.level_poolers.0.offset_fc") for key in heads.state_dict())
    cfg.MODEL.DCN.POOLER_MMDET_LEVELS = True
    heads = ROI_HEADS_REGISTRY.get(name)(cfg, SHAPES)
    for pooler in (heads.box_pooler, heads.mask_pooler):
        assert isinstance(pooler, DCNROIPooler) and pooler.mmdet_levels


@pytest.mark.parametrize("name", ["DCNROIHeads", "DCNCascadeROIHeads"])
def test_keypoint_heads_did_not_know_deformable_poolers(name: str) -> None:
    cfg = slim_config()
    cfg.MODEL.KEYPOINT_ON, cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True, "Cascade" in name
    cfg.MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE, cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = "ModulatedDeformRoIPool", (8,)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3, CLASSES
    cfg.MODEL.DCN.POOLER_FC_DIM = 8
    heads = ROI_HEADS_REGISTRY.get(name)(cfg, SHAPES)
    learnt = [key for key in heads.state_dict() if key.startswith("keypoint_pooler.level_poolers.0.")]
    assert "keypoint_pooler.level_poolers.0.offset_fc.0.weight" in learnt
    assert not any(key.startswith("box_pooler") for key in heads.state_dict())
    truth = targets()
    for one_image in truth:
        one_image.gt_keypoints = Keypoints(torch.tensor([[[20.0, 30, 2], [40, 50, 2], [30, 60, 2]]] * 2) + 30)
        one_image.gt_keypoints.tensor[..., 2] = 2
    with EventStorage():
        found = heads(ImageList(torch.zeros(2, 3, *SIZE), [SIZE, SIZE]), features(), proposals(), truth)[1]
    found["loss_keypoint"].backward()
    assert found["loss_keypoint"] > 0
    assert heads.keypoint_pooler.level_poolers[0].offset_fc[-1].bias.grad.abs().sum() > 0
    assert all(one_image.pred_keypoints.shape[1:] == (3, 3) for one_image in detect(heads))


@pytest.mark.parametrize("name", ["DCNROIHeads", "DCNCascadeROIHeads"])
def test_matchers_follow_the_key(name: str) -> None:
    heads = make(name, ROI_LOW_QUALITY_IOU=0.5)
    matchers = getattr(heads, "proposal_matchers", [heads.proposal_matcher])
    assert all(isinstance(matcher, MinimumIoUMatcher) and matcher.low_quality_iou == 0.5 for matcher in matchers)
    assert [matcher.thresholds[1] for matcher in matchers] == [0.5, 0.6, 0.7][: len(matchers)]


LOGITS = torch.tensor([[[4.0, 0, 0, 1]], [[0.0, 1, 0, 1]], [[0.0, 0, 2, 1]]])  # of three stages, for one proposal


@pytest.mark.parametrize(
    "average_logits, expected",
    [(False, LOGITS.softmax(dim=-1).mean(dim=0)[0]), (True, LOGITS.mean(dim=0).softmax(dim=-1)[0])],
)
def test_scores_average_probabilities_or_logits(
    average_logits: bool, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = make(CASCADE_AVERAGE_LOGITS=average_logits)
    # Boxes grow by 2, 1 and no pixels to the right: deltas are in units of the stage's weights and of the box.
    seen = []

    def run_stage(maps: list[Tensor], found: list[Instances], stage: int) -> tuple[Tensor, Tensor]:
        seen.append(found[0].proposal_boxes.tensor.clone())
        return LOGITS[stage], torch.tensor([[[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0.0, 0, 0, 0]][stage]])

    monkeypatch.setattr(heads, "_run_stage", run_stage)
    one_image = Instances(SIZE, proposal_boxes=Boxes(torch.tensor([[10.0, 10, 50, 40]])))
    (found,) = heads.eval()._forward_box({name: level[:1] for name, level in features().items()}, [one_image])
    scores = torch.zeros(CLASSES + 1)
    scores[found.pred_classes] = found.scores
    kept = expected > 0.05  # Detectron2's threshold
    kept[-1] = False  # the background
    torch.testing.assert_close(scores, torch.where(kept, expected, 0))
    # 1 / 10 and 1 / 20 of a width of 40, each stage from the box of the one before.
    assert [box[0, 0].item() for box in seen] == [10, 14, 16]
    assert (found.pred_boxes.tensor[:, 0] == 16).all()


def test_masks_are_averaged_over_the_stages() -> None:
    heads = make(masks=True, CASCADE_MASK_HEADS=True, CASCADE_RESAMPLE=True)
    assert isinstance(heads.mask_head, MaskHeadPerStage)
    logits = [-2.0, 0.5, 3.0]
    for head, logit in zip(heads.mask_head, logits):
        nn.init.zeros_(head.predictor.weight)
        nn.init.constant_(head.predictor.bias, logit)
    expected = torch.tensor(logits).sigmoid().mean()
    for found in detect(heads):
        assert found.pred_masks.shape == (len(found), 1, 28, 28) and len(found) > 0
        torch.testing.assert_close(found.pred_masks, expected.expand_as(found.pred_masks))


def test_no_detections_have_no_masks() -> None:
    heads = make(masks=True, CASCADE_MASK_HEADS=True, CASCADE_RESAMPLE=True)
    for predictor in heads.box_predictor:
        predictor.test_score_thresh = 2.0
    assert [found.pred_masks.shape for found in detect(heads)] == 2 * [(0, 1, 28, 28)]


def test_names_of_mask_heads_are_those_of_the_published_models() -> None:
    names = {
        name.removeprefix("mask_head.")
        for name in make(masks=True, CASCADE_MASK_HEADS=True, CASCADE_RESAMPLE=True).state_dict()
        if name.startswith("mask_head.")
    }
    layers = ("mask_fcn1", "deconv", "predictor")
    assert names == {f"{s}.{layer}.{kind}" for s in range(3) for layer in layers for kind in ("weight", "bias")}


def test_stages_weigh_their_losses() -> None:
    plain = losses(make(masks=True, CASCADE_MASK_HEADS=True, CASCADE_RESAMPLE=True))
    weighted = losses(make(masks=True, CASCADE_MASK_HEADS=True, **TRAIN))
    kinds = ("loss_cls", "loss_box_reg", "loss_mask")
    assert plain.keys() == weighted.keys() == {f"{kind}_stage{stage}" for kind in kinds for stage in range(3)}
    for stage, weight in enumerate([1, 0.5, 0.25]):
        for kind in kinds:
            assert plain[f"{kind}_stage{stage}"] > 0
            torch.testing.assert_close(weighted[f"{kind}_stage{stage}"], weight * plain[f"{kind}_stage{stage}"])


def test_gradients_of_the_features_are_scaled_or_not() -> None:
    gradients = []
    for scale in (True, False):
        maps = features()
        loss = losses(make(CASCADE_SCALE_GRADIENTS=scale), maps)
        (loss["loss_cls_stage0"] + loss["loss_box_reg_stage0"]).backward()
        gradients.append(maps["p2"].grad)
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], 3 * gradients[0])


def spy_on_stages(heads: ROIHeads) -> Callable[[], list[list[Instances]]]:
    stages: list[list[Instances]] = []
    run_stage = heads._run_stage
    heads._run_stage = lambda maps, found, stage: stages.append(found) or run_stage(maps, found, stage)
    return lambda: stages


def test_each_stage_samples_anew() -> None:
    heads = make(**TRAIN)
    stages = spy_on_stages(heads)
    heads.batch_size_per_image, heads.positive_fraction = 1000, 1.0  # all
    losses(heads)
    for stage, found in enumerate(stages()):
        for one_image in found:
            boxes = one_image.proposal_boxes.tensor
            # 40 proposals and the ground truth, which is there once: what became of it in the last stage is gone.
            # (The first proposals are the ground truth, without noise, so the first stage has them twice.)
            assert len(one_image) == 40 + 2
            assert one_image.is_ground_truth.tolist().count(True) == 2
            assert {tuple(box) for box in boxes[one_image.is_ground_truth].tolist()} == {tuple(b) for b in TRUTH}
            assert (boxes >= 0).all() and (boxes[:, 0::2] <= SIZE[1]).all() and (boxes[:, 1::2] <= SIZE[0]).all()
            # Positive is what the matcher of this stage says.
            x0, y0, x1, y1 = boxes.unbind(1)
            best = torch.zeros(len(boxes))
            for tx0, ty0, tx1, ty1 in TRUTH:
                inter = (x1.clamp(max=tx1) - x0.clamp(min=tx0)).clamp(min=0)
                inter = inter * (y1.clamp(max=ty1) - y0.clamp(min=ty0)).clamp(min=0)
                union = (x1 - x0) * (y1 - y0) + (tx1 - tx0) * (ty1 - ty0) - inter
                best = torch.maximum(best, inter / union)
            assert torch.equal(one_image.gt_classes < CLASSES, best >= [0.5, 0.6, 0.7][stage])


def test_samples_are_as_many_as_the_config_says_in_each_stage() -> None:
    heads = make(**TRAIN)
    stages = spy_on_stages(heads)
    losses(heads)
    assert [[len(one_image) for one_image in found] for found in stages()] == 3 * [[16, 16]]


def test_each_mask_head_learns_from_its_stage() -> None:
    heads = make(masks=True, CASCADE_MASK_HEADS=True, **TRAIN)
    value = losses(heads)
    value["loss_mask_stage1"].backward()
    learnt = [any(p.grad is not None and p.grad.any() for p in head.parameters()) for head in heads.mask_head]
    assert learnt == [False, True, False]


def test_losses_of_a_batch_without_objects() -> None:
    heads = make(masks=True, CASCADE_MASK_HEADS=True, **TRAIN)
    empty = [one_image[torch.zeros(2, dtype=torch.bool)] for one_image in targets()]
    with EventStorage():
        value = heads(ImageList(torch.zeros(2, 3, *SIZE), [SIZE, SIZE]), features(), proposals(), empty)[1]
    assert all(value[f"loss_{kind}_stage{s}"] == 0 for kind in ("mask", "box_reg") for s in range(3))
    sum(value.values()).backward()
    assert all(parameter.grad is not None for parameter in heads.parameters())


def test_mask_loss_is_the_cross_entropy_of_the_stage() -> None:
    heads = make(masks=True, CASCADE_MASK_HEADS=True, **TRAIN)
    for head, logit in zip(heads.mask_head, (-1.0, 0.0, 2.0)):
        nn.init.zeros_(head.predictor.weight)
        nn.init.constant_(head.predictor.bias, logit)
    stages = spy_on_stages(heads)
    value = losses(heads)
    for stage, (found, logit) in enumerate(zip(stages(), (-1.0, 0.0, 2.0))):
        wanted = []
        for one_image in found:
            objects = one_image[one_image.gt_classes < CLASSES]
            wanted.append(objects.gt_masks.crop_and_resize(objects.proposal_boxes.tensor, 28).float())
        wanted = torch.cat(wanted)
        expected = F.binary_cross_entropy_with_logits(torch.full_like(wanted, logit), wanted) * 0.5**stage
        torch.testing.assert_close(value[f"loss_mask_stage{stage}"], expected)


@pytest.mark.parametrize(
    "dcn, message",
    [
        (dict(CASCADE_LOSS_WEIGHTS=(1.0, 0.5)), "CASCADE_LOSS_WEIGHTS has 2 values, but .* there are 3 stages"),
        (dict(CASCADE_MASK_HEADS=True), "CASCADE_MASK_HEADS needs MODEL.DCN.CASCADE_RESAMPLE"),
    ],
)
def test_keys_that_do_not_fit_are_refused(dcn: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(masks=True, **dcn)


def test_mask_heads_need_a_pooler() -> None:
    cfg = slim_config()
    cfg.MODEL.MASK_ON = cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = ""
    cfg.MODEL.DCN.CASCADE_MASK_HEADS = cfg.MODEL.DCN.CASCADE_RESAMPLE = True
    with pytest.raises(ValueError, match="needs a pooler, but MODEL.ROI_MASK_HEAD.POOLER_TYPE is empty"):
        ROI_HEADS_REGISTRY.get("DCNCascadeROIHeads")(cfg, SHAPES)
