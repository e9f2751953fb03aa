# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Names of torchvision's ResNets and ResNeXts -> names of Detectron2's ResNet. Needs neither torch nor Detectron2.

MMDetection's ImageNet weights for ResNeXt-101-32x4d have torchvision's names too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

# The first rule whose pattern matches the whole name gives the new one; "" drops the entry. The groups are numbers of
# stages, which Detectron2 counts from 2, of blocks, and of layers, and the rest of the name.
_RULES = (
    (r"fc\..*|.*\.num_batches_tracked", lambda m: ""),
    (r"conv1\.(weight)", lambda m: f"stem.conv1.{m[1]}"),
    (r"bn1\.(\w+)", lambda m: f"stem.conv1.norm.{m[1]}"),
    (r"layer([1-4])\.(\d+)\.conv([123])\.(weight)", lambda m: f"res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.{m[4]}"),
    (r"layer([1-4])\.(\d+)\.bn([123])\.(\w+)", lambda m: f"res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.norm.{m[4]}"),
    (r"layer([1-4])\.(\d+)\.downsample\.0\.(weight)", lambda m: f"res{int(m[1]) + 1}.{m[2]}.shortcut.{m[3]}"),
    (r"layer([1-4])\.(\d+)\.downsample\.1\.(\w+)", lambda m: f"res{int(m[1]) + 1}.{m[2]}.shortcut.norm.{m[3]}"),
)


def is_torchvision_resnet(state_dict: Mapping[str, object]) -> bool:
    """Tells by its names whether a state dict is that of a ResNet or ResNeXt of torchvision."""
    return {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= state_dict.keys()


def convert_torchvision_resnet(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Renames the entries of a torchvision ResNet to those of Detectron2's; the classifier is left out.

    Raises:
        ValueError: Some names are not those of a ResNet; the message lists them.
    """
    converted: dict[str, Value] = {}
    unknown = []
    for name, value in state_dict.items():
        for pattern, rename in _RULES:
            if match := re.fullmatch(pattern, name):
                if new_name := rename(match):
                    converted[new_name] = value
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{len(unknown)} names are not those of a torchvision ResNet: {', '.join(unknown)}")
    return converted
