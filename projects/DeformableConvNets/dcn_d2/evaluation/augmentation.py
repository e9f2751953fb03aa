# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Test-time augmentation (TEST.AUG): each image in several sizes, and mirrored, with one result."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    DatasetMapperTTA,
    GeneralizedRCNN,
    GeneralizedRCNNWithTTA,
)
from detectron2.modeling.proposal_generator.rrpn import RRPN
from detectron2.modeling.roi_heads import Res5ROIHeads, RROIHeads, StandardROIHeads
from torch import nn

from ..config import with_dcn_keys
from ..data.transforms import OpenCVResizeShortestEdge, OpenCVResizeTransform


def check_augmentation(cfg: CfgNode) -> None:
    """Refuses TEST.AUG.ENABLED for models that `GeneralizedRCNNWithTTA` cannot augment.

    Raises:
        ValueError: The message names the key that does not go with it.
    """
    if not cfg.TEST.AUG.ENABLED:
        return
    model = cfg.MODEL
    for key, registry, possible in (
        ("META_ARCHITECTURE", META_ARCH_REGISTRY, lambda part: part is GeneralizedRCNN),
        ("ROI_HEADS.NAME", ROI_HEADS_REGISTRY, _has_known_heads),
        ("PROPOSAL_GENERATOR.NAME", PROPOSAL_GENERATOR_REGISTRY, lambda part: not _is_a(part, RRPN)),
    ):
        name = model.META_ARCHITECTURE if key == "META_ARCHITECTURE" else model[key.split(".")[0]].NAME
        if name in registry and not possible(registry.get(name)):
            raise ValueError(
                f"TEST.AUG.ENABLED is True, but MODEL.{key} is {name}: test-time augmentation is for the boxes and "
                "masks of a GeneralizedRCNN with StandardROIHeads, CascadeROIHeads, DCNROIHeads, DCNCascadeROIHeads or "
                "Res5ROIHeads. Set TEST.AUG.ENABLED to False"
            )
    for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
        if model[key]:
            raise ValueError(
                f"TEST.AUG.ENABLED is True, but test-time augmentation does not work with MODEL.{key} True: set one of "
                "them to False"
            )


def _is_a(part: Any, *kinds: type) -> bool:
    return isinstance(part, type) and issubclass(part, kinds)


def _has_known_heads(part: Any) -> bool:
    return _is_a(part, StandardROIHeads, Res5ROIHeads) and not _is_a(part, RROIHeads)


def is_augmented(model: nn.Module) -> bool:
    """Whether a model augments its images by itself."""
    return isinstance(model, GeneralizedRCNNWithTTA)


def without_augmentation(cfg: CfgNode) -> CfgNode:
    """Gives `cfg` if it has no test-time augmentation, else a copy in which it is switched off."""
    if not cfg.TEST.AUG.ENABLED:
        return cfg
    copy = cfg.clone()
    copy.defrost()
    copy.TEST.AUG.ENABLED = False
    return copy


def build_augmented_model(cfg: CfgNode, model: nn.Module) -> GeneralizedRCNNWithTTA:
    """Wraps a model so that it sees each image in the sizes of TEST.AUG and, with TEST.AUG.FLIP, also mirrored.

    Args:
        cfg: of the model.
        model: a `GeneralizedRCNN`, also one in `DistributedDataParallel`. It stays as it is.
    """
    check_augmentation(cfg)
    resizes_with_opencv = with_dcn_keys(cfg).INPUT.RESIZE_WITH == "cv2"
    mapper = (OpenCVDatasetMapperTTA if resizes_with_opencv else DatasetMapperTTA)(cfg)
    augmented = GeneralizedRCNNWithTTA(cfg, model, tta_mapper=mapper)
    augmented.train(model.training)  # the evaluation puts the mode back that it finds
    return augmented


class OpenCVDatasetMapperTTA(DatasetMapperTTA):
    """Detectron2's `DatasetMapperTTA` with the resizing of `OpenCVResizeShortestEdge`; arguments as there."""

    def __call__(self, dataset_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """Gives one dict for each size, and for each size mirrored, with the transforms from the original image.

        Args:
            dataset_dict: what the loader for evaluation gives for an image.
        """
        pixels = dataset_dict["image"].permute(1, 2, 0).numpy()
        original = dataset_dict["height"], dataset_dict["width"]
        before: list[T.Transform] = []
        if pixels.shape[:2] != original:
            before.append(OpenCVResizeTransform(*original, *pixels.shape[:2]))
        copies = []
        for size in self.min_sizes:
            resize = OpenCVResizeShortestEdge(size, self.max_size).get_transform(pixels)
            resized = resize.apply_image(pixels)
            mirror = T.HFlipTransform(resized.shape[1])
            seen = [(resized, [resize]), (mirror.apply_image(resized), [resize, mirror])]
            for image, after in seen if self.flip else seen[:1]:
                copies.append(
                    dataset_dict
                    | {
                        "image": torch.from_numpy(image.transpose(2, 0, 1).copy()),
                        "transforms": T.TransformList([*before, *after]),
                    }
                )
        return copies
