# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Small models with random weights whose detections mean something, and what Detectron2 computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from dcn_d2 import model_zoo
from dcn_d2.export.check import detect_eagerly, score_threshold

from ..slim import SLIM

__all__ = ["detect_eagerly", "images", "lively_model"]


def lively_model(row: str, seed: int = 0, opts: Sequence[Any] = ()) -> tuple[CfgNode, Any]:
    """Builds a narrow model of a row of the zoo, with weights that give many different detections.

    Offsets and masks of deformable layers differ from place to place. Norms get the statistics of what they see, so
    that values neither vanish nor grow from layer to layer. Offsets depend little on what they see, and blocks add
    little to their shortcuts: otherwise, differences of rounding grow with each of 101 layers, up to other detections.
    Feature maps in float32 then differ from those in float64 by about 3e-6 of the largest value.
    """
    cfg = model_zoo.get_config(row)
    cfg.merge_from_list([*SLIM, *opts])
    return cfg, build_lively(cfg, seed)


def build_lively(cfg: CfgNode, seed: int = 0) -> Any:
    """Does what `lively_model` does, for a config."""
    torch.manual_seed(seed)
    model = build_model(cfg).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "offset" in name or "mask_fc" in name:
                parameter.normal_(0, 0.2 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.5)
            elif ".conv3.norm.weight" in name:
                parameter.fill_(0.1)
            elif name.endswith(("bbox_pred.weight", "anchor_deltas.weight")):
                parameter.mul_(10)
            elif name.endswith("objectness_logits.weight"):
                parameter.mul_(30)
        _fit_norms(model)
        _spread_scores(model, cfg)
        if cfg.MODEL.MASK_ON:
            _fill_masks(model)
    return model


def _fit_norms(model: Any) -> None:
    def fit(norm: Any, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        norm.running_mean.copy_(x.mean((0, 2, 3)))
        norm.running_var.copy_(x.var((0, 2, 3), unbiased=False) + 1e-3)

    norms = [module for module in model.backbone.modules() if hasattr(module, "running_var")]
    hooks = [norm.register_forward_pre_hook(fit) for norm in norms]
    model.backbone((images(1, 128, 160) - model.pixel_mean) / model.pixel_std)
    for hook in hooks:
        hook.remove()


def _spread_scores(model: Any, cfg: CfgNode) -> None:
    """Scales the weights of the classifiers so that their logits have a standard deviation of 3."""
    predictors = model.roi_heads.box_predictor
    predictors = list(predictors) if isinstance(predictors, nn.ModuleList) else [predictors]
    for predictor in predictors:
        seen: list[Tensor] = []
        hook = predictor.cls_score.register_forward_hook(lambda *arguments, seen=seen: seen.append(arguments[2]))
        detect_eagerly(model, images(1, 128, 160), [(128, 160)])
        hook.remove()
        predictor.cls_score.weight.mul_(3 / seen[0].std().clamp(min=1e-6))


def _fill_masks(model: Any) -> None:
    """Gives logits of masks a standard deviation of 1 around 2: masks with holes, and few pixels at the threshold."""
    for module in model.roi_heads.mask_head.modules():
        if isinstance(getattr(module, "predictor", None), nn.Conv2d):
            seen: list[Tensor] = []
            hook = module.predictor.register_forward_hook(lambda *arguments, seen=seen: seen.append(arguments[2]))
            with score_threshold(model, 0.0):
                detect_eagerly(model, images(1, 128, 160), [(128, 160)])
            hook.remove()
            module.predictor.weight.div_(seen[0].std().clamp(min=1e-6))
            module.predictor.bias.fill_(2.0)


def images(number: int, height: int, width: int, seed: int = 7) -> Tensor:
    """Images of noise, (N, 3, H, W) from 0 to 255."""
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 255
