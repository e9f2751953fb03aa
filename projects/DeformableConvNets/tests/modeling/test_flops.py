# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What Detectron2's own tools count of a deformable model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.analysis import flop_count_operators
from fvcore.nn import FlopCountAnalysis
from torch import nn

from dcn_d2.layers import DeformConv, ModulatedDeformConv

from ..slim import slim_config


@pytest.mark.parametrize("modulated", [False, True])
def test_a_deformable_backbone_costs_its_branches_and_the_interpolation_more(modulated: bool) -> None:
    image = torch.zeros(1, 3, 64, 96)
    plain = build_backbone(slim_config())
    deformable = build_backbone(
        slim_config(DEFORM_ON_PER_STAGE=[False, True, True, True], DEFORM_MODULATED=modulated, DEFORM_NUM_GROUPS=2)
    )
    extra = 0

    def add(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        nonlocal extra
        positions = output.shape[2] * output.shape[3]
        if isinstance(module, nn.Conv2d):  # an offset branch
            extra += positions * module.weight.numel()
        else:
            extra += positions * 4 * inputs[0].shape[1] * 9

    hooks = []
    for name, module in deformable.named_modules():
        if name.endswith("conv2_offset") or isinstance(module, (DeformConv, ModulatedDeformConv)):
            hooks.append(module.register_forward_hook(add))
    deformable(image)
    for hook in hooks:
        hook.remove()
    assert extra > 0
    total = FlopCountAnalysis(deformable, image).unsupported_ops_warnings(False).total()
    assert total == FlopCountAnalysis(plain, image).unsupported_ops_warnings(False).total() + extra


@pytest.mark.slow
@pytest.mark.parametrize("pooler", ["ModulatedDeformRoIPool", "ModulatedDeformPSRoIPool"])
def test_detectron2_counts_our_operators(pooler: str) -> None:
    cfg = slim_config(DEFORM_ON_PER_STAGE=[False, True, True, True], DEFORM_MODULATED=True)
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "DCNROIHeads", pooler
    counted = flop_count_operators(build_model(cfg), [{"image": torch.zeros(3, 64, 64)}])
    assert counted["deform_conv2d"] > 0
    assert counted["deform_psroi_pool" if "PS" in pooler else "deform_roi_pool"] > 0
