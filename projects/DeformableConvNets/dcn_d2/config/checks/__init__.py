# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Checks a config before anything is built from it: each value, values that must agree, and keys that nothing reads.

Who calls what:

- `load_config` calls `find_problems`: a config that was read is right, but may still be changed;
- the trainer and the predictor call `check_config` when they get a config, which any code may have made or changed;
- each builder of a backbone, RPN or RoI heads calls `check_part`, because any of them may be used alone.

All of them go through `find_problems`, which takes less than a millisecond. The checks themselves are in the modules
of this folder, by what they are about; `dcn_d2.config.table` says what each value by itself may be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from detectron2.config import CfgNode

from ..access import value_of
from ..messages import ConfigError, shorten
from ..table import RULES
from .backbone import check_features, check_fpn, check_resnet
from .heads import check_box_weights, check_cascade, check_heads, check_labels, check_poolers
from .images import check_channels, check_images
from .names import check_names
from .parts import Check, Problem, find_part, is_known
from .unread import unread_keys, warn_of_unread_keys

__all__ = [
    "Problem",
    "check_channels",
    "check_config",
    "check_part",
    "find_problems",
    "raise_problems",
    "unread_keys",
    "warn_of_unread_keys",
]

MODEL_CHECKS: tuple[Check, ...] = (
    check_names,
    check_resnet,
    check_fpn,
    check_features,
    check_labels,
    check_box_weights,
    check_poolers,
    check_heads,
    check_cascade,
)
# What is checked of a part that the config does not name, as of the ResNet below another FPN than ours.
PART_CHECKS: dict[str, tuple[Check, ...]] = {
    "MODEL.BACKBONE.NAME": (check_resnet, check_fpn),
    "MODEL.PROPOSAL_GENERATOR.NAME": (),
    "MODEL.ROI_HEADS.NAME": (check_heads, check_cascade),
}
# The part that a key names, and the keys to which a part from another package may give more values: a ResNet of another
# depth, another pooler, boxes with an angle.
EXTENDED_BY = {
    "MODEL.BACKBONE.NAME": r"MODEL\.(RESNETS|FPN)\..*",
    "MODEL.PROPOSAL_GENERATOR.NAME": r"MODEL\.RPN\.BBOX_REG_LOSS_TYPE",
    "MODEL.ROI_HEADS.NAME": r"MODEL\.ROI_\w+_HEAD\.(POOLER_TYPE|BBOX_REG_LOSS_TYPE|NORM)",
}


def check_config(cfg: CfgNode, training: bool = False) -> None:
    """Raises for values that cannot work, and warns once of each key that is set but that nothing reads.

    Args:
        cfg: the config; keys of dcn_d2 that it lacks have their defaults.
        training: also refuse an empty DATASETS.TRAIN.

    Raises:
        ConfigError: with key, value and what is allowed, for everything that is wrong.
    """
    problems = find_problems(cfg) + [*_check_gpu(cfg)]
    if training and not problems and not cfg.DATASETS.TRAIN:
        message = "DATASETS.TRAIN is empty: nothing to train on (is --config-file missing?)"
        problems = [("DATASETS.TRAIN", message)]
    raise_problems(problems)
    warn_of_unread_keys(cfg)


def check_part(cfg: CfgNode, key: str, name: str) -> None:
    """Does what `check_config` does, for the keys below MODEL; the builders of dcn_d2 call it.

    If the config names another part, only this one is checked: for example the ResNet below an FPN of another package.

    Args:
        cfg: the config.
        key: which part is built, for example "MODEL.BACKBONE.NAME".
        name: name of the part.
    """
    if value_of(cfg, key) == name:
        raise_problems(find_problems(cfg, "MODEL.", MODEL_CHECKS) + [*_check_gpu(cfg)])
        warn_of_unread_keys(cfg)
        return
    copy = cfg.clone()
    copy.defrost()
    copy.merge_from_list([key, name])
    raise_problems(find_problems(copy, "MODEL.", PART_CHECKS[key]))


def find_problems(
    cfg: CfgNode, below: str = "", checks: Sequence[Check] = (*MODEL_CHECKS, check_images)
) -> list[Problem]:
    """Gives all values that are wrong by themselves or, only if there are none, those that contradict each other.

    Args:
        cfg: the config.
        below: look only at the values of keys that begin with this.
        checks: which contradictions to look for.
    """
    problems = []
    for key, rule in RULES.items():
        if not key.startswith(below) or _is_for_others(cfg, key):
            continue
        value = value_of(cfg, key, missing := object())
        problem = None if value is missing else rule(value)
        if problem is not None:
            problems.append((key, f"{key} {problem}, got {shorten(value)}"))
    return problems or [problem for check in checks for problem in check(cfg)]


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raises a `ConfigError` with all messages, if there are any."""
    messages = [message for _, message in problems]
    if len(messages) > 1:
        messages.insert(0, f"{len(messages)} values of the config are wrong:")
    if messages:
        raise ConfigError("\n  ".join(messages))


def _is_for_others(cfg: CfgNode, key: str) -> bool:
    """Whether a part reads the key that is neither dcn_d2's nor Detectron2's: only that part knows what it may be."""
    import detectron2.modeling as modeling

    registries = (modeling.BACKBONE_REGISTRY, modeling.PROPOSAL_GENERATOR_REGISTRY, modeling.ROI_HEADS_REGISTRY)
    for (reader, keys), registry in zip(EXTENDED_BY.items(), registries):
        if re.fullmatch(keys, key):
            name = value_of(cfg, reader)
            part = find_part(registry, name) if isinstance(name, str) else None
            return part is not None and not is_known(part)
    return False


def _check_gpu(cfg: CfgNode) -> Iterator[Problem]:
    """The GPU that MODEL.DEVICE numbers must exist. Without any GPU, `fit_to_machine` takes the CPU."""
    if not isinstance(cfg.MODEL.DEVICE, str) or not cfg.MODEL.DEVICE.startswith("cuda:"):
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus <= (torch.device(cfg.MODEL.DEVICE).index or 0):
        yield "MODEL.DEVICE", f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but the GPUs of this machine are 0 to {gpus - 1}"
