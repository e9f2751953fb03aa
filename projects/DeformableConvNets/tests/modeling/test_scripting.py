# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Backbones in TorchScript, scripted and traced: values of eager mode, also where only the library is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.export.torchscript_patch import freeze_training_mode
from detectron2.modeling import build_backbone
from torch import nn

from ..slim import slim_config
from ..torchscript import run_alone

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def make_backbone(name: str, modulated: bool) -> nn.Module:
    """A narrow backbone whose offset branches give something."""
    torch.manual_seed(0)
    cfg = slim_config(DEFORM_ON_PER_STAGE=[False, True, True, True], DEFORM_MODULATED=modulated, NORM="FrozenBN")
    cfg.MODEL.BACKBONE.NAME = name
    if "retinanet" in name:
        cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
        levels = ["p3", "p4", "p5", "p6", "p7"]
        cfg.MODEL.RPN.IN_FEATURES, cfg.MODEL.ROI_HEADS.IN_FEATURES = levels, levels[:3]
    elif "fpn" not in name:
        cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
    backbone: nn.Module = build_backbone(cfg).eval()
    for part, module in backbone.named_modules():
        if part.endswith("conv2_offset"):
            nn.init.normal_(module.weight, std=0.05)
    return backbone


BACKBONES = [
    ("build_dcn_resnet_backbone", True),
    ("build_dcn_resnet_fpn_backbone", False),
    ("build_dcn_resnet_fpn_backbone", True),
    ("build_dcn_retinanet_resnet_fpn_backbone", True),
]


def test_backbones_run_where_only_the_compiled_library_is_loaded(tmp_path: Path) -> None:
    """Detectron2's patches, which `detectron2.export` applies when it is imported, make ResNet and FPN scriptable."""
    images = torch.rand(2, 3, 64, 96)
    models, expected = [], []
    for name, modulated in BACKBONES:
        backbone = make_backbone(name, modulated)
        with torch.no_grad(), freeze_training_mode(backbone):
            scripted = torch.jit.script(backbone)
            assert all(not isinstance(part, torch.jit.ScriptModule) for part in backbone.modules())
            traced = torch.jit.trace(backbone, images[:1, :, :32], strict=False)
            for model in (scripted, traced):
                models.append((model, (images,)))
                expected.append(backbone(images))
    for found, wanted in zip(run_alone(models, tmp_path), expected, strict=True):
        assert found.keys() == wanted.keys()
        for name, maps in wanted.items():
            torch.testing.assert_close(found[name], maps, rtol=1e-4, atol=1e-4)
