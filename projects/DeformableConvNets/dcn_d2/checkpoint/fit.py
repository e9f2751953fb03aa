# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Compares the entries of a file with those of a model."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from .heads import describe_replaced_heads
from .mmdet import unwrap_name
from .names import CONSTANTS, COUNTERS, shown

logger = logging.getLogger(__name__)

# Entries that may be missing or left over: they are made from the config, or nothing reads them.
OPTIONAL = re.compile(f"{CONSTANTS}|{COUNTERS}")


def unwrap_module(model: nn.Module) -> nn.Module:
    """The module inside of DistributedDataParallel, DataParallel and torch.compile, in any order."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(
        inner := getattr(model, "module" if isinstance(model, wrappers) else "_orig_mod", None), nn.Module
    ):
        model = inner
    return model


def model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's entries by their names without wrappers."""
    state = model.state_dict()
    names = {name: unwrap_name(name) for name in state}
    if all(name == short for name, short in names.items()):
        return state  # with the versions of its layers
    return {short: state[name] for name, short in names.items()}


class Fit:
    """Decides whether the entries of a file may be loaded into a model.

    Args:
        model: the model.
        origin: names the file in messages.
        fine_tune: allows that heads, neck and offset branches differ, and the number of image channels.
    """

    def __init__(self, model: nn.Module, origin: str, fine_tune: bool) -> None:
        self.model, self.origin, self.fine_tune = model, origin, fine_tune

    def fit_resnet(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Gives the entries of a ResNet the names that they have in the model.

        Raises:
            ValueError: They are not all entries of the model's ResNet, or do not have its shapes.
        """
        model = model_state(self.model)
        stems = [name for name in model if name.endswith("stem.conv1.weight")]
        if len(stems) != 1:
            raise ValueError(f"{self.origin} holds a ResNet, but the model has {len(stems)} ResNets instead of one")
        prefix = stems[0].removesuffix("stem.conv1.weight")
        own = {name: value for name, value in model.items() if name.startswith((f"{prefix}stem.", f"{prefix}res"))}
        found = {name: value for key, value in weights.items() if (name := prefix + key) in own}
        if not any(".conv2_offset." in name for name in found):  # an ordinary ResNet: the branches start from zero
            own = {name: value for name, value in own.items() if ".conv2_offset." not in name}
        problems = _differences(own, found)
        for name in self._stem_for_other_images(own, found) if self.fine_tune else ():
            logger.warning(f"fine-tuning from {self.origin}: {problems.pop(name)}: the stem starts afresh")
            del found[name]
        if problems:
            raise ValueError(_listed(f"{self.origin} does not fit the model's ResNet", problems))
        rest = len([name for name in model if name not in found and not OPTIONAL.fullmatch(name)])
        logger.info(f"{self.origin} holds a ResNet: the model's {rest} other entries keep their initial values")
        return found

    def check(self, weights: Mapping[str, Any]) -> None:
        """Checks the entries of a whole model.

        Raises:
            ValueError: Some are missing, unknown or of another shape; the message lists them.
        """
        problems = _differences(model_state(self.model), weights)
        if not any(name.endswith(".running_mean") for name in weights):
            # Detectron2's oldest models have the statistics folded into weight and bias, as FrozenBatchNorm2d expects.
            frozen = [name for name, module in self.model.named_modules() if isinstance(module, FrozenBatchNorm2d)]
            for name in frozen:
                problems.pop(f"{name}.running_mean", None)
                problems.pop(f"{name}.running_var", None)
        fatal = problems
        if self.fine_tune:
            stem = self._stem_for_other_images(model_state(self.model), weights)
            fatal = {name: text for name, text in problems.items() if not (_may_start_afresh(name) or name in stem)}
        if fatal:
            raise ValueError(_listed(f"{self.origin} does not fit the model", fatal))
        if problems:
            for line in describe_replaced_heads(self.model, model_state(self.model), weights, problems):
                logger.warning(f"fine-tuning from {self.origin}: {line}")
            fate = "what does not fit is left out, and the model's entries keep their initial values"
            logger.warning(_listed(f"fine-tuning from {self.origin}: {fate}", problems))

    def _stem_for_other_images(self, model: Mapping[str, Any], weights: Mapping[str, Any]) -> list[str]:
        """Names the weights of the stem that are for another number of image channels, such as 1 (grey) instead of 3.

        Raises:
            ValueError: They are frozen, so that a fresh one would never learn.
        """
        frozen = {unwrap_name(name) for name, value in self.model.named_parameters() if not value.requires_grad}
        found = []
        for name in (name for name in model if name.endswith("stem.conv1.weight") and name in weights):
            mine, theirs = list(model[name].shape), list(weights[name].shape)
            if mine == theirs or mine[:1] + mine[2:] != theirs[:1] + theirs[2:]:
                continue
            if name in frozen:
                raise ValueError(
                    f"{self.origin}: {name} is {theirs}, the model's is {mine}, for images of {mine[1]} channel(s). It "
                    "would have to start afresh, but is frozen: set MODEL.BACKBONE.FREEZE_AT to 0, or take images of "
                    f"{theirs[1]} channel(s) (INPUT.FORMAT, MODEL.PIXEL_MEAN)"
                )
            found.append(name)
        return found


def _may_start_afresh(name: str) -> bool:
    """Whether training may start without an entry. It needs all of the ResNet except its offset branches."""
    neck = name.startswith(("backbone.fpn_", "backbone.top_block."))
    return not name.startswith("backbone.") or ".conv2_offset." in name or neck


def _differences(model: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, str]:
    """One sentence for each entry that is missing, unknown or of another shape."""
    differences = {}
    for name in (*model, *(name for name in weights if name not in model)):
        if name not in weights and not OPTIONAL.fullmatch(name):
            differences[name] = f"{name} is missing"
        elif name not in model and not OPTIONAL.fullmatch(name):
            differences[name] = f"{shown(name)} is unknown"
        elif name in model and name in weights and tuple(model[name].shape) != tuple(weights[name].shape):
            theirs, mine = list(weights[name].shape), list(model[name].shape)
            differences[name] = f"{name} is {theirs}, the model's is {mine}"
    return differences


def _listed(what: str, problems: Mapping[str, str]) -> str:
    return "\n  ".join([f"{what} ({len(problems)} entries):", *problems.values()])
