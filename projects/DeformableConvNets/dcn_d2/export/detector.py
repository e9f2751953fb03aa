# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A trained model as a module that maps tensors to tensors, which exporters can take."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

from .heads import find_boxes, find_masks, paste
from .proposals import is_larger, propose

MASKS = ("boxes", "pasted", "none")


class ExportableBackbone(nn.Module):
    """Normalises images as a model of Detectron2 does, and runs its backbone.

    Args:
        model: with `backbone`, `pixel_mean` and `pixel_std`.
        dtype: in which the backbone computes.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.backbone = model.backbone.to(dtype)
        self.dtype = dtype
        self.register_buffer("pixel_mean", model.pixel_mean.clone(), persistent=False)
        self.register_buffer("pixel_std", model.pixel_std.clone(), persistent=False)
        self.names = sorted(model.backbone.output_shape())

    def features(self, images: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
        """Gives the feature maps by name; what `images` hold outside of `image_sizes` counts as zeros."""
        rows = torch.arange(images.shape[2], device=images.device)[:, None]
        columns = torch.arange(images.shape[3], device=images.device)
        heights, widths = image_sizes[:, :, None, None].unbind(dim=1)  # (N, 1, 1) each
        inside = (rows < heights) & (columns < widths)
        normalised = (images - self.pixel_mean) / self.pixel_std
        return self.backbone(normalised.masked_fill(~inside[:, None], 0.0).to(self.dtype))

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        """Maps images (N, C, H, W), and their heights and widths (N, 2), to float32 feature maps, as `names` says."""
        features = self.features(images, image_sizes)
        return tuple(features[name].float() for name in self.names)


class ExportableDetector(nn.Module):
    """Faster, Mask, Cascade or Cascade Mask R-CNN of Detectron2 as a function of tensors.

    Numbers of boxes are fixed, and results are filled up with boxes of class -1. So all shapes are known but for the
    number of images, their height and their width. It computes what the model computes, with the model's own layers.

    Args:
        model: a `GeneralizedRCNN` in evaluation mode. Its layers are shared; with another `dtype` they are changed.
        masks: "boxes" gives the masks within their boxes, "pasted" in the image, and "none" leaves them out.
        dtype: in which backbone and heads compute. Boxes, scores and pooling stay float32.

    Raises:
        ValueError: the model has parts that this module does not know.
    """

    def __init__(self, model: GeneralizedRCNN, masks: str = "boxes", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.masks = masks if model.roi_heads.mask_on else "none"
        self.trunk = ExportableBackbone(model, dtype)
        self.proposal_generator = model.proposal_generator
        self.roi_heads = model.roi_heads
        self.proposal_generator.rpn_head.to(dtype)
        for name in ("box_head", "box_predictor", "mask_head"):
            if hasattr(self.roi_heads, name):
                getattr(self.roi_heads, name).to(dtype)

    @property
    def names(self) -> list[str]:
        """The names of the results."""
        return ["boxes", "scores", "classes", *(["masks"] if self.masks != "none" else [])]

    def forward(self, images: Tensor, image_sizes: Tensor, output_size: Tensor | None = None) -> tuple[Tensor, ...]:
        """Detects objects.

        Args:
            images: (N, C, H, W), values from 0 to 255. H and W are multiples of the backbone's size divisibility.
            image_sizes: (N, 2), height and width of the image in each canvas; it lies at the top left.
            output_size: (2,), height and width to which boxes and masks are scaled, for masks="pasted" only.

        Returns:
            Boxes (N, D, 4), scores (N, D) and classes (N, D), best first, with class -1 where there is no detection;
            with masks also these: (N, D, h, w) probabilities, or (N, D, *output_size) truth values if pasted.
        """
        features = self.trunk.features(images, image_sizes)
        proposals, valid = propose(self.proposal_generator, features, image_sizes)
        boxes, scores, classes = find_boxes(self.roi_heads, features, proposals, valid, image_sizes)
        if self.masks == "none":
            return boxes, scores, classes
        masks = find_masks(self.roi_heads, features, boxes, classes)
        if self.masks == "boxes":
            return boxes, scores, classes, masks
        assert output_size is not None
        scale = (output_size[None].to(boxes.dtype) / image_sizes.to(boxes.dtype)).flip(-1)  # (N, 2): x, y
        limits = output_size.to(boxes.dtype).flip(0)
        boxes = boxes * torch.cat([scale, scale], dim=-1)[:, None]
        boxes = torch.minimum(boxes.clamp(min=0), torch.cat([limits, limits]))
        found = (classes >= 0) & is_larger(boxes, 0.0)
        masks = paste(masks, boxes, output_size) & found[..., None, None]
        return (
            boxes.masked_fill(~found[..., None], 0.0),
            scores.masked_fill(~found, 0.0),
            classes.masked_fill(~found, -1),
            masks,
        )
