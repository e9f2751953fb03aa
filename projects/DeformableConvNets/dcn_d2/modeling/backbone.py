# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""ResNet and ResNeXt with deformable convolutions, with or without FPN. Detectron2 builds them; this changes conv2."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet, build_resnet_backbone
from detectron2.modeling.backbone import resnet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn

from ..config import with_dcn_keys
from ..config.checks import check_part
from ..layers import DeformConv, ModulatedDeformConv
from ..layers._layer import offset_branch
from .mmdet import fix_batch_norm_statistics


def use_dcn_layers_in_detectron2() -> None:
    """Makes Detectron2's own `DeformBottleneckBlock` use the layers of dcn_d2.

    Detectron2's own deformable configs (`Misc/*dconv*`, backbone `build_resnet_fpn_backbone`) then build and run on
    CPU too, and where Detectron2's compiled operators are missing. Blocks that exist already keep their layers.
    `add_dcn_config` calls it; a second call changes nothing.
    """
    resnet.DeformConv = DeformConv
    resnet.ModulatedDeformConv = ModulatedDeformConv


class DeformBottleneckBlock(CNNBlockBase):
    """A bottleneck block whose 3x3 convolution is deformable, with offsets predicted from that convolution's input.

    It is made from a plain block, whose layers, weights and norms it takes over. Parameters have the names of
    Detectron2's class of this name: `conv2` and, for the offset branch, `conv2_offset`. The branch has no conv groups,
    not in ResNeXt either, and starts with zeros.

    Args:
        plain: the block to take over. It must not be used afterwards.
        deform_modulated: modulated deformable convolution (v2) instead of v1.
        deform_num_groups: deform groups of conv2.
    """

    def __init__(self, plain: BottleneckBlock, *, deform_modulated: bool = False, deform_num_groups: int = 1) -> None:
        super().__init__(plain.in_channels, plain.out_channels, plain.stride)
        self.deform_modulated = deform_modulated
        self.shortcut = plain.shortcut
        self.conv1 = plain.conv1
        conv = plain.conv2
        taps = deform_num_groups * conv.kernel_size[0] * conv.kernel_size[1]
        self.conv2_offset = Conv2d(
            conv.in_channels,
            (3 if deform_modulated else 2) * taps,
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
        )
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(cast(Tensor, self.conv2_offset.bias))
        self.conv2 = (ModulatedDeformConv if deform_modulated else DeformConv)(
            conv.in_channels,
            conv.out_channels,
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            deformable_groups=deform_num_groups,
            bias=False,
            norm=conv.norm,
        )
        self.conv2.weight = conv.weight
        self.conv3 = plain.conv3

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = F.relu_(self.conv1(x))
        out = F.relu_(self._deform(out))
        out = self.conv3(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)

    def _deform(self, x: Tensor) -> Tensor:
        """Maps (N, bottleneck_channels, H, W) to (N, bottleneck_channels, H / stride, W / stride).

        Runs the offset branch, conv2 and its norm.
        """
        if torch.jit.is_scripting():
            return self.conv2(x, self.conv2_offset(x))
        return self.conv2(x, offset_branch(self.conv2_offset, x))


def memory_format_of(cfg: CfgNode) -> torch.memory_format:
    """The memory format that MODEL.DCN.MEMORY_FORMAT gives weights and feature maps on MODEL.DEVICE.

    Raises:
        ValueError: the key has a value that is not allowed.
    """
    name = with_dcn_keys(cfg).MODEL.DCN.MEMORY_FORMAT
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    if name == "auto":
        name = "channels_last" if torch.device(cfg.MODEL.DEVICE).type == "cpu" else "contiguous"
    if name not in formats:
        raise ValueError(f"MODEL.DCN.MEMORY_FORMAT must be auto, contiguous or channels_last, got {name!r}")
    return formats[name]


@BACKBONE_REGISTRY.register()
def build_dcn_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Builds a ResNet or ResNeXt whose stages are deformable where the config says so.

    Reads Detectron2's keys for `build_resnet_backbone`, among them MODEL.RESNETS.DEFORM_ON_PER_STAGE,
    DEFORM_MODULATED and DEFORM_NUM_GROUPS, and its own keys MODEL.DCN.NORM_EVAL and MEMORY_FORMAT. Stages below
    MODEL.BACKBONE.FREEZE_AT are frozen, deformable ones too. Images have as many channels as MODEL.PIXEL_MEAN has
    values, 1 for grey ones.

    Raises:
        ConfigError: a key below MODEL has a value that is not allowed.
    """
    cfg = with_dcn_keys(cfg)
    check_part(cfg, "MODEL.BACKBONE.NAME", "build_dcn_resnet_backbone")
    resnets = cfg.MODEL.RESNETS
    deform_on_per_stage = list(resnets.DEFORM_ON_PER_STAGE)
    plain_cfg = cfg.clone()
    plain_cfg.defrost()
    plain_cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    plain_cfg.MODEL.BACKBONE.FREEZE_AT = 0  # freezing comes last, after the blocks have been changed
    backbone = build_resnet_backbone(plain_cfg, input_shape)

    for name in backbone.stage_names:
        if deform_on_per_stage[int(name.removeprefix("res")) - 2]:
            stage = getattr(backbone, name)
            for index, block in enumerate(stage):
                stage[index] = DeformBottleneckBlock(
                    block,
                    deform_modulated=resnets.DEFORM_MODULATED,
                    deform_num_groups=resnets.DEFORM_NUM_GROUPS,
                )
    if cfg.MODEL.DCN.NORM_EVAL:
        fix_batch_norm_statistics(backbone)
    # The weights decide the memory format of all maps: a convolution with a channels_last weight gives such a map.
    return backbone.freeze(cfg.MODEL.BACKBONE.FREEZE_AT).to(memory_format=memory_format_of(cfg))


@BACKBONE_REGISTRY.register()
def build_dcn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds an FPN on top of `build_dcn_resnet_backbone`, as Detectron2's `build_resnet_fpn_backbone` does."""
    check_part(cfg, "MODEL.BACKBONE.NAME", "build_dcn_resnet_fpn_backbone")
    return _build_fpn(cfg, build_dcn_resnet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_dcn_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds an FPN with P6 and P7 for RetinaNet and FCOS, as Detectron2's `build_retinanet_resnet_fpn_backbone` does.

    P6 is a convolution on res5, which must be among MODEL.RESNETS.OUT_FEATURES, and P7 one on P6.
    """
    check_part(cfg, "MODEL.BACKBONE.NAME", "build_dcn_retinanet_resnet_fpn_backbone")
    bottom_up = build_dcn_resnet_backbone(cfg, input_shape)
    channels = bottom_up.output_shape()["res5"].channels
    return _build_fpn(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _build_fpn(cfg: CfgNode, bottom_up: ResNet, top_block: nn.Module) -> FPN:
    backbone = FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
    return backbone.to(memory_format=memory_format_of(cfg))
