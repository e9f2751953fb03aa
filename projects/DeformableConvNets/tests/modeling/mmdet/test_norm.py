# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import ResNet
from detectron2.solver import build_optimizer
from torch import nn

from dcn_d2.modeling import FixedStatsBatchNorm2d, build_dcn_resnet_backbone, fix_batch_norm_statistics

from ...slim import slim_config


def norm_eval_backbone(norm: str = "BN", freeze_at: int = 2) -> ResNet:
    cfg = slim_config(DEFORM_ON_PER_STAGE=[False, True, True, True], NORM=norm)
    cfg.MODEL.DCN.NORM_EVAL = True
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    torch.manual_seed(0)
    backbone = build_dcn_resnet_backbone(cfg, ShapeSpec(channels=3))
    for name, buffer in backbone.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return backbone


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_statistics_stay_while_weight_and_bias_train(norm: str) -> None:
    backbone = norm_eval_backbone(norm).train()
    statistics = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    images = torch.randn(2, 3, 64, 64)
    backbone(images)["res5"].square().mean().backward()
    for name, buffer in backbone.named_buffers():
        assert torch.equal(buffer, statistics[name]), name
    trained = [m for m in (*backbone.res3.modules(), *backbone.res5.modules()) if isinstance(m, nn.BatchNorm2d)]
    assert len(trained) == 13 + 10
    assert all(type(m) is FixedStatsBatchNorm2d and m.weight.grad.abs().sum() > 0 for m in trained)
    with torch.no_grad():
        training = backbone(images)["res5"]
        torch.testing.assert_close(training, backbone.eval()(images)["res5"])


def test_frozen_stages_stay_frozen() -> None:
    backbone = norm_eval_backbone(freeze_at=3)
    for stage in (backbone.stem, backbone.res2, backbone.res3):
        assert any(isinstance(module, FrozenBatchNorm2d) for module in stage.modules())
        assert not any(parameter.requires_grad for parameter in stage.parameters())


def test_names_are_those_of_batch_norm() -> None:
    cfg = slim_config(DEFORM_ON_PER_STAGE=[False, True, True, True], NORM="BN")
    plain = build_dcn_resnet_backbone(cfg, ShapeSpec(channels=3))
    assert norm_eval_backbone(freeze_at=0).state_dict().keys() == plain.state_dict().keys()


def test_parameters_are_shared_with_the_replaced_norm() -> None:
    plain = nn.Sequential(nn.BatchNorm2d(4, eps=0.1), nn.Sequential(nn.GroupNorm(2, 4)))
    norm, group_norm = plain[0], plain[1][0]
    fix_batch_norm_statistics(plain)
    assert type(plain[0]) is FixedStatsBatchNorm2d and plain[0].eps == 0.1
    assert plain[0].weight is norm.weight and plain[0].running_mean is norm.running_mean
    assert plain[1][0] is group_norm


def test_optimizer_sees_a_norm() -> None:
    # WEIGHT_DECAY_NORM of the rows' recipe is applied by Detectron2 to the norms that it recognises.
    cfg = slim_config(NORM="BN")
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.125
    optimizer = build_optimizer(cfg, nn.Sequential(FixedStatsBatchNorm2d(4), nn.Conv2d(1, 1, 1)))
    decays = {p.numel(): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {4: 0.125, 1: cfg.SOLVER.WEIGHT_DECAY}


def test_statistics_that_do_not_exist_cannot_be_fixed() -> None:
    with pytest.raises(ValueError, match="keeps no running statistics"):
        fix_batch_norm_statistics(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)))
