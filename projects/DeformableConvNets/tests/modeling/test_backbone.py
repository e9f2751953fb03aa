# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import detectron2.model_zoo
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock as TheirDeformBottleneckBlock
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from dcn_d2 import add_dcn_config
from dcn_d2.config import with_dcn_keys
from dcn_d2.layers import DeformConv, ModulatedDeformConv
from dcn_d2.modeling import DeformBottleneckBlock
from dcn_d2.modeling.backbone import memory_format_of

from ..slim import slim_config

C3_TO_C5 = [False, True, True, True]
UPSTREAM = Path(detectron2.model_zoo.__file__).parent / "configs" / "Misc"

# Values for keys of MODEL.RESNETS; the deform groups and conv groups differ, so that they cannot be mixed up.
ARCHITECTURES = {
    "v1": dict(DEFORM_ON_PER_STAGE=C3_TO_C5),
    "v2": dict(DEFORM_ON_PER_STAGE=C3_TO_C5, DEFORM_MODULATED=True),
    "v2 with 4 deform groups": dict(DEFORM_ON_PER_STAGE=C3_TO_C5, DEFORM_MODULATED=True, DEFORM_NUM_GROUPS=4),
    "v1 in res5 only, dilated": dict(DEFORM_ON_PER_STAGE=[False] * 3 + [True], RES5_DILATION=2),
    "v1 everywhere, stride in the 1x1": dict(DEFORM_ON_PER_STAGE=[True] * 4, STRIDE_IN_1X1=True),
    "ResNeXt, v2": dict(
        DEFORM_ON_PER_STAGE=C3_TO_C5, DEFORM_MODULATED=True, DEFORM_NUM_GROUPS=2, NUM_GROUPS=8, WIDTH_PER_GROUP=4
    ),
}
architectures = pytest.mark.parametrize("resnets", ARCHITECTURES.values(), ids=ARCHITECTURES)


def backbone_of(cfg: CfgNode, name: str = "build_dcn_resnet_backbone") -> nn.Module:
    return BACKBONE_REGISTRY.get(name)(cfg, ShapeSpec(channels=3))


def randomise(module: nn.Module) -> None:
    """Gives every norm statistics of its own, and every offset branch offsets of a pixel or so."""
    for name, tensor in module.state_dict().items():
        if name.endswith(("norm.weight", "running_var")):
            tensor.uniform_(0.5, 1.5)
        elif "conv2_offset" in name or name.endswith(("norm.bias", "running_mean")):
            tensor.normal_(std=0.1)


def deform_blocks(module: nn.Module) -> dict[str, nn.Module]:
    kinds = (DeformBottleneckBlock, TheirDeformBottleneckBlock)
    return {name: child for name, child in module.named_modules() if isinstance(child, kinds)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@architectures
class TestArchitectures:
    def test_names_shapes_and_numbers_are_those_of_detectron2(self, resnets: dict) -> None:
        cfg = slim_config(**resnets)
        mine = backbone_of(cfg).eval()
        theirs = backbone_of(cfg, "build_resnet_backbone").eval()  # runs with the layers of dcn_d2
        assert deform_blocks(mine).keys() == deform_blocks(theirs).keys() != set()
        randomise(mine)
        theirs.load_state_dict(mine.state_dict(), strict=True)
        # The two round in different places, and every random layer magnifies that.
        mine, theirs, images = mine.double(), theirs.double(), torch.randn(2, 3, 64, 96).double()
        with torch.no_grad():
            for name, features in theirs(images).items():
                torch.testing.assert_close(mine(images)[name], features)
        assert mine.output_shape() == theirs.output_shape()

    def test_starts_as_the_plain_network(self, resnets: dict) -> None:
        # Zero offsets leave a plain convolution, times the initial modulation of 0.5 in v2.
        cfg = slim_config(**resnets)
        deformable = backbone_of(cfg).eval()
        cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
        plain = backbone_of(cfg, "build_resnet_backbone").eval()
        weights = deformable.state_dict()
        for name in deform_blocks(deformable) if cfg.MODEL.RESNETS.DEFORM_MODULATED else ():
            weights[f"{name}.conv2.weight"] = 0.5 * weights[f"{name}.conv2.weight"]
        missing = plain.load_state_dict(
            {name: value for name, value in weights.items() if "conv2_offset" not in name}, strict=True
        )
        assert not missing.missing_keys
        images = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            for name, features in plain(images).items():
                torch.testing.assert_close(deformable(images)[name], features, rtol=1e-3, atol=1e-3)

    def test_everything_learns(self, resnets: dict) -> None:
        backbone = backbone_of(slim_config(**resnets))
        features = backbone(torch.randn(2, 3, 64, 64))
        sum(level.square().mean() for level in features.values()).backward()
        still = [name for name, parameter in backbone.named_parameters() if not parameter.grad.abs().sum() > 0]
        assert not still


def test_fpn_has_the_names_of_detectron2() -> None:
    cfg = slim_config(DEFORM_ON_PER_STAGE=C3_TO_C5)
    mine = backbone_of(cfg, "build_dcn_resnet_fpn_backbone")
    theirs = backbone_of(cfg, "build_resnet_fpn_backbone")
    theirs.load_state_dict(mine.state_dict(), strict=True)
    assert mine.output_shape() == theirs.output_shape()
    assert list(mine.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]


def test_offsets_come_first_and_the_mask_is_the_sigmoid_of_the_last_third() -> None:
    cfg = slim_config(DEFORM_ON_PER_STAGE=C3_TO_C5, DEFORM_MODULATED=True, DEFORM_NUM_GROUPS=4)
    backbone = backbone_of(cfg)
    randomise(backbone)
    seen: dict[str, tuple[Any, ...]] = {}
    block = backbone.res4[0]
    block.conv2_offset.register_forward_hook(lambda module, inputs, output: seen.update(branch=(*inputs, output)))
    block.conv2.register_forward_hook(lambda module, inputs, output: seen.update(conv=(*inputs, output.clone())))
    backbone(torch.randn(1, 3, 64, 64))
    (branch_input, branch), (x, offset_and_mask, output) = seen["branch"], seen["conv"]
    assert branch.shape[1] == 4 * 27 and x is branch_input and offset_and_mask is branch
    offset, mask = branch[:, : 4 * 18], branch[:, 4 * 18 :].sigmoid()
    torch.testing.assert_close(output, block.conv2(x, offset, mask))


def test_resnext_has_a_grouped_convolution_and_a_dense_branch() -> None:
    cfg = slim_config(DEFORM_ON_PER_STAGE=C3_TO_C5, NUM_GROUPS=8, WIDTH_PER_GROUP=4)
    block = backbone_of(cfg).res3[0]
    assert isinstance(block.conv2, DeformConv) and block.conv2.groups == 8
    assert block.conv2.weight.shape == (64, 8, 3, 3)
    assert block.conv2_offset.weight.shape == (18, 64, 3, 3)


def test_stages_that_are_not_read_are_not_built() -> None:
    cfg = slim_config(DEFORM_ON_PER_STAGE=C3_TO_C5, OUT_FEATURES=["res4"])
    assert not any(name.startswith("res5") for name, _ in backbone_of(cfg).named_parameters())


@pytest.mark.parametrize("freeze_at", [0, 2, 3])
def test_frozen_stages_include_deformable_ones(freeze_at: int) -> None:
    cfg = slim_config(DEFORM_ON_PER_STAGE=C3_TO_C5, NORM="BN")
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    backbone = backbone_of(cfg)
    for number, stage in enumerate([backbone.stem, backbone.res2, backbone.res3, backbone.res4], start=1):
        frozen = number <= freeze_at
        assert all(parameter.requires_grad != frozen for parameter in stage.parameters())
        norms = [m for m in stage.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))]
        assert norms and all(isinstance(norm, FrozenBatchNorm2d) == frozen for norm in norms)


@pytest.mark.parametrize("norm", ["", "BN", "FrozenBN", "GN", "SyncBN", "LN"])
def test_norms_of_detectron2(norm: str) -> None:
    # GN has 32 groups, so all widths must be multiples of 32.
    cfg = slim_config(DEFORM_ON_PER_STAGE=C3_TO_C5, DEFORM_MODULATED=True, NORM=norm, WIDTH_PER_GROUP=32)
    mine, theirs = backbone_of(cfg).eval(), backbone_of(cfg, "build_resnet_backbone").eval()
    theirs.load_state_dict(mine.state_dict(), strict=True)
    mine, theirs, images = mine.double(), theirs.double(), torch.randn(1, 3, 64, 64).double()
    torch.testing.assert_close(mine(images)["res5"], theirs(images)["res5"])


def test_residual_networks_without_bottlenecks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"DEFORM_ON_PER_STAGE=\[False, True, True, True\] .*DEPTH=18 does not have"):
        backbone_of(slim_config(DEFORM_ON_PER_STAGE=C3_TO_C5, DEPTH=18))
    assert backbone_of(slim_config(DEPTH=18)).output_shape()["res5"].channels == 512


def test_a_flag_for_each_stage_is_needed() -> None:
    with pytest.raises(ValueError, match=r"needs 4 values, for res2 to res5, got \[True, True\]"):
        backbone_of(slim_config(DEFORM_ON_PER_STAGE=[True, True]))


@pytest.mark.parametrize("path", sorted(UPSTREAM.glob("*dconv*.yaml")), ids=lambda path: path.stem)
def test_detectron2s_own_deformable_configs_build_with_both_builders(path: Path) -> None:
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        theirs = build_model(cfg)
        cfg.MODEL.BACKBONE.NAME = "build_dcn_resnet_fpn_backbone"
        mine = build_model(cfg)
    for model in (mine, theirs):
        convs = [block.conv2 for block in deform_blocks(model).values()]
        kind = ModulatedDeformConv if cfg.MODEL.RESNETS.DEFORM_MODULATED else DeformConv
        assert convs and all(type(conv) is kind for conv in convs)
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (mine, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("modulated", [False, True])
def test_detectron2s_own_deformable_config_runs_on_cpu(modulated: bool) -> None:
    base = get_cfg()
    base.merge_from_file(str(UPSTREAM / "mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml"))
    cfg = slim_config(base, DEFORM_MODULATED=modulated)
    assert cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"
    model = build_model(cfg).eval()
    with torch.no_grad():
        (result,) = model([{"image": torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)}])
    assert result["instances"].image_size == (64, 96)


def test_backbone_is_what_the_config_names() -> None:
    backbone = build_backbone(slim_config(DEFORM_ON_PER_STAGE=C3_TO_C5))
    assert len(deform_blocks(backbone)) == 4 + 6 + 3


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("auto", torch.channels_last),  # the tests run on the CPU
        ("contiguous", torch.contiguous_format),
        ("channels_last", torch.channels_last),
    ],
)
@pytest.mark.parametrize("builder", ["build_dcn_resnet_backbone", "build_dcn_resnet_fpn_backbone"])
def test_feature_maps_have_the_memory_format_of_the_config(
    value: str, expected: torch.memory_format, builder: str
) -> None:
    cfg = slim_config(DEFORM_ON_PER_STAGE=C3_TO_C5, DEFORM_MODULATED=True)
    cfg.MODEL.DCN.MEMORY_FORMAT = "contiguous"
    plain = backbone_of(cfg, builder).eval()
    cfg.MODEL.DCN.MEMORY_FORMAT = value
    backbone = backbone_of(cfg, builder).eval()
    backbone.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features, reference = backbone(images), plain(images)
    for name, feature in features.items():
        assert feature.is_contiguous(memory_format=expected)
        torch.testing.assert_close(feature, reference[name], rtol=1e-3, atol=1e-4)


def test_on_a_gpu_auto_is_contiguous() -> None:
    cfg = slim_config()
    cfg.MODEL.DEVICE = "cuda"
    assert memory_format_of(cfg) == torch.contiguous_format


def test_unknown_memory_format_is_refused() -> None:
    cfg = slim_config()
    cfg.MODEL.DCN.MEMORY_FORMAT = "nhwc"
    with pytest.raises(
        ValueError, match="MODEL.DCN.MEMORY_FORMAT must be auto, contiguous or channels_last, got 'nhwc'"
    ):
        backbone_of(cfg)


def retinanet_config(**resnets: Any) -> CfgNode:
    """A narrow RetinaNet on the backbone with P6 and P7."""
    cfg = slim_config(DEFORM_ON_PER_STAGE=C3_TO_C5, NORM="BN", **resnets)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_dcn_retinanet_resnet_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CONVS = 2, 1
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    return cfg


def one_step(model: nn.Module) -> None:
    """Trains on one image, and wants a gradient for every parameter."""
    truth = Instances((128, 160), gt_boxes=Boxes(torch.tensor([[8.0, 8, 40, 50]])), gt_classes=torch.tensor([1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with EventStorage():
        losses = model.train()([{"image": torch.randint(0, 255, (3, 128, 160)).float(), "instances": truth}])
    sum(losses.values()).backward()
    optimizer.step()
    assert all(loss.isfinite() for loss in losses.values())
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    for part in ("top_block.p6", "top_block.p7", "res5.0.conv2_offset", "fpn_output3"):
        assert any(part in name for name in changed), part


def test_backbone_with_p7_has_the_names_and_numbers_of_detectron2() -> None:
    cfg = retinanet_config()
    mine = backbone_of(cfg, "build_dcn_retinanet_resnet_fpn_backbone").eval()
    theirs = backbone_of(cfg, "build_retinanet_resnet_fpn_backbone").eval()
    theirs.load_state_dict(mine.state_dict(), strict=True)
    assert mine.output_shape() == theirs.output_shape()
    assert list(mine.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
    mine, theirs, images = mine.double(), theirs.double(), torch.randn(1, 3, 128, 128).double()
    with torch.no_grad():
        for name, features in theirs(images).items():
            torch.testing.assert_close(mine(images)[name], features)


def test_retinanet_had_no_backbone_with_p7() -> None:
    model = build_model(retinanet_config())
    one_step(model)
    with torch.no_grad():
        (result,) = model.eval()([{"image": torch.zeros(3, 64, 96)}])
    assert result["instances"].image_size == (64, 96)


def test_fcos_trains_on_the_backbone_with_p7() -> None:
    cfg = retinanet_config()
    backbone = build_backbone(cfg)
    head = FCOSHead(input_shape=list(backbone.output_shape().values()), num_classes=2, conv_dims=[32], norm="GN")
    levels = list(backbone.output_shape())
    mean, std = cfg.MODEL.PIXEL_MEAN, [57.0] * 3
    one_step(FCOS(backbone=backbone, head=head, head_in_features=levels, num_classes=2, pixel_mean=mean, pixel_std=std))


@pytest.mark.parametrize("channels", [1, 2, 4, 8])
def test_images_may_have_any_number_of_channels(channels: int) -> None:
    cfg = slim_config(DEFORM_ON_PER_STAGE=C3_TO_C5)
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [34.0] * channels, [25.0] * channels
    cfg.INPUT.FORMAT = {1: "L", 4: "RGBA"}.get(channels, "BGR")  # which says nothing where others read the images
    model = build_model(cfg).eval()
    assert model.backbone.bottom_up.stem.conv1.weight.shape[1] == channels
    with torch.no_grad():
        (result,) = model([{"image": torch.zeros(channels, 64, 96)}])
    assert result["instances"].image_size == (64, 96)


@pytest.mark.parametrize("lacking", ["MODEL.DCN", "MODEL.DCN.NORM_EVAL", "MODEL.DCN.MEMORY_FORMAT"])
@pytest.mark.parametrize("heads", ["StandardROIHeads", "DCNROIHeads", "DCNCascadeROIHeads"])
def test_a_config_without_our_keys_was_refused(lacking: str, heads: str) -> None:
    cfg = slim_config(DEFORM_ON_PER_STAGE=C3_TO_C5)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME, cfg.MODEL.ROI_HEADS.NAME = "DCNRPN", heads
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = "Cascade" in heads
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignV2" if heads == "StandardROIHeads" else "DeformRoIPool"
    del cfg["PUBLISHED"], cfg.SOLVER["OFFSET_LR_FACTOR"], cfg.INPUT["RESIZE_WITH"]
    del (cfg.MODEL if lacking == "MODEL.DCN" else cfg.MODEL.DCN)[lacking.rpartition(".")[2]]
    cfg.freeze()
    before = cfg.dump()
    model = build_model(cfg).eval()
    assert cfg.dump() == before and cfg.is_frozen()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert model.backbone(images)["p2"].is_contiguous(memory_format=torch.channels_last)
    if lacking == "MODEL.DCN" and heads != "StandardROIHeads":
        assert model.roi_heads.box_pooler.level_poolers[0].offset_fc[0].out_features == 1024


def test_a_config_with_all_our_keys_is_taken_as_it_is() -> None:
    cfg = slim_config()
    assert with_dcn_keys(cfg) is cfg
