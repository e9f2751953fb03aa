# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The learning rate of offset branches, and how a resumed run takes over a saved optimizer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


def split_offset_branches(optimizer: torch.optim.Optimizer, model: nn.Module, factor: float) -> None:
    """Moves the convolutions that predict offsets into separate groups, and multiplies their learning rate by `factor`.

    The groups do not depend on the factor: a checkpoint fits after the factor was changed.
    """
    # They are called conv2_offset in Detectron2's blocks, and conv_offset in the layers that contain one.
    offsets = {p for name, p in model.named_parameters() if name.endswith(("_offset.weight", "_offset.bias"))}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if parameter in offsets]
        if moved and len(moved) < len(group["params"]):
            group["params"] = [parameter for parameter in group["params"] if parameter not in offsets]
            optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * factor})
        elif moved:
            group["lr"] *= factor


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Gives what the groups of an optimizer hold besides their parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def fit_saved_state(
    state: Mapping[str, Any], optimizer: torch.optim.Optimizer, unsplit: Callable[[], list[list[nn.Parameter]]]
) -> dict[str, Any]:
    """Fits a saved state to the groups of `optimizer`.

    In checkpoints of older versions that were trained with SOLVER.OFFSET_LR_FACTOR 1, offset branches are in the same
    groups as the other parameters.

    Args:
        state: `state_dict()` of the optimizer of the run that is resumed.
        optimizer: the optimizer of this run.
        unsplit: gives the parameters of each group as they were before `split_offset_branches`.

    Raises:
        ValueError: It does not fit: the model or the frozen parameters are different.
    """
    sizes = [len(group["params"]) for group in state["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if sizes == own:
        return dict(state)
    groups_before = unsplit()
    if sizes != [len(group) for group in groups_before]:
        raise ValueError(
            f"the checkpoint's optimizer has groups of {sizes} parameters, this run's has {own}: what is trained and "
            "what is frozen, and the keys SOLVER.WEIGHT_DECAY_* and BIAS_LR_FACTOR, must be those of the run that "
            "--resume goes on with (to start a new one from its weights, name them in MODEL.WEIGHTS)"
        )
    logger.info("the checkpoint's optimizer has offset branches in the same group as other parameters: it is split")
    saved = [number for group in state["param_groups"] for number in group["params"]]
    number_of = dict(zip([parameter for group in groups_before for parameter in group], saved))
    # "params" of a saved group are the numbers of its parameters, counted through all groups.
    groups, entries, counter = [], {}, 0
    for group in optimizer.param_groups:
        numbers = []
        for parameter in group["params"]:
            if number_of[parameter] in state["state"]:
                entries[counter] = state["state"][number_of[parameter]]
            numbers.append(counter)
            counter += 1
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": numbers})
    return {"state": entries, "param_groups": groups}


def apply_rates(
    optimizer: torch.optim.Optimizer, scheduler: Any, configured: list[dict[str, Any]], iteration: int
) -> None:
    """Gives a resumed optimizer the learning rates, decay and momentum of this run's config.

    Args:
        optimizer: it has the state of the run that is resumed.
        scheduler: of the learning rate; it has the state of that run, too.
        configured: `hyperparameters` of the optimizer as this run's config built it.
        iteration: the one that comes next, for the log.
    """
    changes = []
    for number, (group, own) in enumerate(zip(optimizer.param_groups, configured)):
        saved_base, base = group.get("initial_lr", group["lr"]), own.get("initial_lr", own["lr"])
        if abs(saved_base - base) > 1e-12 * max(abs(saved_base), abs(base)):
            changes.append(f"{saved_base:g} to {base:g} for {len(group['params'])} parameters of group {number}")
        rate = group["lr"] * base / saved_base if saved_base else base
        group.update(copy.deepcopy({key: value for key, value in own.items() if key != "lr"}), lr=rate)
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if type(scheduler).__name__ == "LRMultiplier":  # its rates depend on the iteration alone
        for group, rate in zip(optimizer.param_groups, scheduler.get_lr()):
            group["lr"] = rate
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    if changes:
        logger.info(
            f"base learning rates change from the checkpoint to this config at iteration {iteration}: "
            + ", ".join(changes)
        )
