# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Content of a foreign file -> content of a file of Detectron2. Needs neither torch nor Detectron2."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .mmdet import convert_mmdet_state_dict, has_v1_layout, is_mmdet_detector, unwrap_state_dict
from .torchvision import convert_torchvision_resnet, is_torchvision_resnet

logger = logging.getLogger(__name__)

_V1 = "MMDetection 1.x, converted by dcn_d2"


def is_foreign(checkpoint: Mapping[str, Any]) -> bool:
    """Tells whether `convert_checkpoint` takes a checkpoint."""
    return is_mmdet_detector(checkpoint) or is_torchvision_resnet(unwrap_state_dict(checkpoint))


def convert_checkpoint(checkpoint: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Turns the content of a foreign file into that of one of Detectron2's.

    Args:
        checkpoint: of a two-stage detector of MMDetection, or a ResNet or ResNeXt of torchvision.
        origin: names the file in messages.

    Raises:
        ValueError: It is neither, or has entries that are unknown.
    """
    try:
        weights = unwrap_state_dict(checkpoint)
        if is_mmdet_detector(weights):
            # With the counters of BatchNorm, which the zoo's rows have too: Detectron2 would report them as missing.
            return {
                "model": convert_mmdet_state_dict(weights, keep_num_batches_tracked=True),
                "__author__": _V1 if has_v1_layout(weights) else "MMDetection, converted by dcn_d2",
            }
        if is_torchvision_resnet(weights):
            # A ResNet alone: where it goes in the model is for Detectron2 to find out.
            return {
                "model": convert_torchvision_resnet(weights),
                "__author__": "torchvision, converted by dcn_d2",
                "matching_heuristics": True,
            }
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    raise ValueError(
        f"{origin} is neither a detector of MMDetection nor a ResNet of torchvision; its first entries are "
        f"{', '.join(list(map(str, weights))[:5])}. A file of Detectron2 needs no prefix before its path"
    )


def warn_of_v1(converted: Mapping[str, Any], origin: str) -> None:
    """Warns if what was converted is of a version that computed differently."""
    if converted.get("__author__") == _V1:
        logger.warning(
            f"{origin} is of MMDetection 1.x, which computed boxes with another width (x2 - x1 + 1), rounded anchors, "
            "and pooled without alignment: expect up to 1 AP less than it had there"
        )
