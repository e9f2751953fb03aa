# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Who made a file of weights, and its conversion to a file of Detectron2. Needs neither torch nor Detectron2."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from enum import Enum
from typing import Any

from . import names
from .mmdet import convert_mmdet_state_dict, has_v1_layout, is_mmdet_detector, unwrap_state_dict
from .torchvision import convert_torchvision_resnet, is_torchvision_resnet

logger = logging.getLogger(__name__)

CLASS_NAMES = "class_names"  # the entry of a file of `DCNCheckpointer` that holds the names of its classes


class Provenance(Enum):
    """The makers whose files dcn_d2 converts; the value is the maker's name in messages."""

    MMDET_V1 = "MMDetection 1.x"
    MMDET = "MMDetection"
    TORCHVISION = "torchvision"

    @property
    def author(self) -> str:
        """What a converted file says under "__author__"."""
        return f"{self.value}, converted by dcn_d2"


def recognise(checkpoint: Mapping[str, Any]) -> Provenance | None:
    """Tells by its names who made a checkpoint; None if `convert_checkpoint` does not take it."""
    weights = unwrap_state_dict(checkpoint)
    if is_mmdet_detector(weights):
        return Provenance.MMDET_V1 if has_v1_layout(weights) else Provenance.MMDET
    return Provenance.TORCHVISION if is_torchvision_resnet(weights) else None


def read_author(author: object) -> Provenance | None:
    """Tells by the text under "__author__" what a file was converted from; None if dcn_d2 did not convert it."""
    return next((provenance for provenance in Provenance if provenance.author == author), None)


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
        provenance = recognise(weights)
        if provenance is Provenance.TORCHVISION:
            # A ResNet alone: where it goes in the model is for Detectron2 to find out.
            converted = convert_torchvision_resnet(weights)
            return {"model": converted, "__author__": provenance.author, "matching_heuristics": True}
        if provenance:
            # With the counters of BatchNorm, which the zoo's rows have too: Detectron2 would report them as missing.
            converted = convert_mmdet_state_dict(weights, keep_num_batches_tracked=True)
            return {"model": converted, "__author__": provenance.author}
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    first = ", ".join(names.shown(name) for name in list(weights)[:5])
    raise ValueError(
        f"{origin} is neither a detector of MMDetection nor a ResNet of torchvision; "
        f"{f'its first entries are {first}' if first else 'it has no entries'}. A file of Detectron2 needs no "
        "conversion, and no mmdet:// before its path"
    )


def read_class_names(checkpoint: Mapping[str, Any]) -> tuple[str, ...]:
    """Gives the names of classes that a file says about itself, those of `DCNCheckpointer` and MMDetection; () if none.

    Args:
        checkpoint: the whole content of the file, before its weights are taken out.
    """
    meta = [part for key in ("meta", "dataset_meta") if isinstance(part := checkpoint.get(key), Mapping)]
    meta += [part for one in meta if isinstance(part := one.get("dataset_meta"), Mapping)]
    found = [checkpoint.get(CLASS_NAMES), *(one.get(key) for one in meta for key in ("CLASSES", "classes"))]
    for names_there in found:
        if isinstance(names_there, (list, tuple)) and all(isinstance(name, str) for name in names_there):
            return tuple(names_there)
    return ()


def warn_of_v1(provenance: Provenance | None, origin: str) -> None:
    """Warns if a file is of the version of MMDetection that computed differently."""
    if provenance is Provenance.MMDET_V1:
        logger.warning(
            f"{origin} is of {provenance.value}, which computed boxes with another width (x2 - x1 + 1), rounded "
            "anchors, and pooled without alignment: expect up to 1 AP less than it had there"
        )
