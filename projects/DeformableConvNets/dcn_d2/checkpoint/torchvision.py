# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Names of torchvision's ResNets and ResNeXts -> names of Detectron2's ResNet. Needs neither torch nor Detectron2.

MMDetection's ImageNet weights for ResNeXt-101-32x4d have torchvision's names too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import names


def is_torchvision_resnet(state_dict: Mapping[str, object]) -> bool:
    """Tells by its names whether a state dict is that of a ResNet or ResNeXt of torchvision."""
    return {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= state_dict.keys()


def convert_torchvision_resnet(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the entries of a torchvision ResNet to those of Detectron2's; the classifier is left out.

    Raises:
        ValueError: Some names are not those of a ResNet, or a value is not a tensor; all are listed.
    """
    return names.rename(state_dict, names.RESNET, "of a torchvision ResNet", f"{names.CLASSIFIER}|{names.COUNTERS}")
