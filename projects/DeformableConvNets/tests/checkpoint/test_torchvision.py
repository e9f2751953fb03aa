# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import pickle
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet, resnet50

from dcn_d2.checkpoint import DCNCheckpointer, convert_torchvision_resnet, is_torchvision_resnet
from dcn_d2.modeling import build_dcn_resnet_backbone

from ..slim import slim_config

# torchvision's own classes generate the files: they have the layout of the published ones.
WIDTH, GROUPS = 4, 2


def their_resnet() -> ResNet:
    torch.manual_seed(0)
    model = ResNet(Bottleneck, [3, 4, 6, 3], groups=GROUPS, width_per_group=WIDTH).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return model


def config(**changes: object) -> CfgNode:
    """A config whose ResNet is as wide as `their_resnet`."""
    resnets = dict(
        NUM_GROUPS=GROUPS,
        WIDTH_PER_GROUP=WIDTH,
        STEM_OUT_CHANNELS=64,
        RES2_OUT_CHANNELS=256,
        NORM="BN",
        DEFORM_ON_PER_STAGE=[False, True, True, True],
    )
    cfg = slim_config(**(resnets | changes))
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    return cfg


def features_of(model: ResNet, images: torch.Tensor) -> torch.Tensor:
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    return model.layer4(model.layer3(model.layer2(model.layer1(x))))


@pytest.mark.parametrize("arguments", [{}, {"groups": 32, "width_per_group": 4, "layers": [3, 4, 23, 3]}])
def test_names_and_shapes_become_those_of_detectron2(arguments: dict) -> None:
    with torch.device("meta"):
        theirs = ResNet(Bottleneck, arguments.pop("layers"), **arguments) if arguments else resnet50()
        cfg = slim_config(
            STEM_OUT_CHANNELS=64,
            RES2_OUT_CHANNELS=256,
            NORM="BN",
            DEPTH=101 if arguments else 50,
            NUM_GROUPS=arguments.get("groups", 1),
            WIDTH_PER_GROUP=arguments.get("width_per_group", 64),
        )
        mine = build_dcn_resnet_backbone(cfg, ShapeSpec(channels=3))
    assert is_torchvision_resnet(theirs.state_dict())
    converted = convert_torchvision_resnet(theirs.state_dict())
    assert {name: value.shape for name, value in converted.items()} == {
        name: value.shape for name, value in mine.state_dict().items() if not name.endswith("num_batches_tracked")
    }


def test_unknown_names_are_listed() -> None:
    value = torch.zeros(1)
    weights = {"conv1.weight": value, "fc.bias": value, "bn1.num_batches_tracked": value}
    assert convert_torchvision_resnet(weights) == {"stem.conv1.weight": value}
    weights |= {"layer5.0.conv1.weight": value, "neck": value, "layer1.0.conv2.conv_offset.weight": value}
    with pytest.raises(ValueError, match="not the weights of a torchvision ResNet") as error:
        convert_torchvision_resnet(weights | {"bn1.bias": 7})
    assert str(error.value).splitlines()[1:] == [
        "  layer5.0.conv1.weight is unknown",
        "  neck is unknown",
        "  layer1.0.conv2.conv_offset.weight is unknown",
        "  bn1.bias is of type int, not a tensor",
    ]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("fpn", [False, True])
def test_loaded_file_gives_the_features_of_torchvision(tmp_path: Path, fpn: bool, wrapped: bool) -> None:
    theirs = their_resnet()
    weights = theirs.state_dict()
    torch.save({"state_dict": weights, "meta": {"epoch": 1}} if wrapped else weights, tmp_path / "resnext.pth")
    cfg = config()
    mine = build_backbone(cfg) if fpn else build_dcn_resnet_backbone(cfg, ShapeSpec(channels=3))
    model = nn.ModuleDict({"backbone": mine}).eval()
    DCNCheckpointer(model).load(str(tmp_path / "resnext.pth"))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        res5 = (mine.bottom_up if fpn else mine)(images)["res5"]
        torch.testing.assert_close(res5, features_of(theirs, images), rtol=1e-3, atol=1e-3)


def test_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "resnext.pth")
    torch.save(their_resnet().state_dict(), path)
    wide = build_backbone(config(WIDTH_PER_GROUP=8))
    with pytest.raises(
        ValueError, match=r"(?s)resnext.pth .*res2.0.conv1.weight is \[8, 64, 1, 1\], the model's is \[16,"
    ):
        DCNCheckpointer(wide).load(path)
    deep = build_backbone(config(DEPTH=101))
    with pytest.raises(ValueError, match="bottom_up.res4.22.conv3.weight is missing"):
        DCNCheckpointer(deep).load(path)
    with pytest.raises(ValueError, match="the model has 0 ResNets"):
        DCNCheckpointer(nn.Linear(1, 1)).load(path)


def test_imagenet_file_of_detectron2_loads(tmp_path: Path) -> None:
    # The layout of detectron2://ImageNetPretrained/torchvision/R-50.pkl.
    theirs = their_resnet()
    weights = {name: value.numpy() for name, value in convert_torchvision_resnet(theirs.state_dict()).items()}
    data = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(data))
    backbone = build_backbone(config()).eval()
    DCNCheckpointer(backbone).load(str(tmp_path / "R-50.pkl"))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        res5 = backbone.bottom_up(images)["res5"]
        torch.testing.assert_close(res5, features_of(theirs, images), rtol=1e-3, atol=1e-3)


def test_own_files_load_as_before(tmp_path: Path) -> None:
    first, second = build_backbone(config()), build_backbone(config())
    DCNCheckpointer(first, str(tmp_path)).save("model")
    DCNCheckpointer(second).load(str(tmp_path / "model.pth"))
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value)
