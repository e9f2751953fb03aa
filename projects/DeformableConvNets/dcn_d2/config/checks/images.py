# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Checks that the keys about images agree."""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.config import CfgNode

from ..rules import channels_of
from .parts import Problem


def check_images(cfg: CfgNode) -> Iterator[Problem]:
    """Mean and deviation must fit the channels of an image, and the sizes of resizing and cropping their method."""
    # Images with more channels than PIL knows have their own reader, which INPUT.FORMAT does not concern.
    yield from check_channels(cfg, channels_of(cfg.INPUT.FORMAT) if len(cfg.MODEL.PIXEL_MEAN) <= 4 else None)
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and (len(sizes) != 2 or sizes[0] > sizes[1]):
        key = "INPUT.MIN_SIZE_TRAIN"
        yield key, f"{key} must be the least and the largest size with INPUT.MIN_SIZE_TRAIN_SAMPLING range, got {sizes}"
    crop = cfg.INPUT.CROP
    relative = crop.TYPE.startswith("relative")
    if crop.ENABLED and any(size > 1 if relative else type(size) is not int for size in crop.SIZE):
        allowed = "parts of the image, at most 1," if relative else "whole numbers of pixels"
        yield "INPUT.CROP.SIZE", f"INPUT.CROP.SIZE must be {allowed} with INPUT.CROP.TYPE {crop.TYPE}, got {crop.SIZE}"


def check_channels(cfg: CfgNode, channels: int | None) -> Iterator[Problem]:
    """Each channel of an image must have a mean and a deviation.

    Args:
        cfg: the config.
        channels: of the images that the model takes, None if that is not known. One channel, which is grey, fits any
            number of means: it is repeated.
    """
    means, deviations = len(cfg.MODEL.PIXEL_MEAN), len(cfg.MODEL.PIXEL_STD)
    if deviations != means:
        yield (
            "MODEL.PIXEL_STD",
            f"MODEL.PIXEL_STD must have as many values as MODEL.PIXEL_MEAN, {means}, got {deviations}",
        )
    if channels not in (None, 1, means):
        yield (
            "MODEL.PIXEL_MEAN",
            f"MODEL.PIXEL_MEAN must have {channels} values for INPUT.FORMAT {cfg.INPUT.FORMAT}, got {means}",
        )
