# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The mask heads of Cascade Mask R-CNN: one for each stage."""

from __future__ import annotations

import torch
from detectron2.structures import Instances
from torch import Tensor, nn


class MaskHeadPerStage(nn.ModuleList):
    """Mask heads of Detectron2, one for each stage of a cascade.

    Called at test time, they average their masks. In training each stage calls its own head, `heads[stage]`.

    Source: Cai and Vasconcelos, "Cascade R-CNN: High Quality Object Detection and Instance Segmentation", TPAMI 2019,
    section 5.
    """

    def forward(self, x: Tensor, instances: list[Instances]) -> list[Instances]:
        """Predicts masks, as probabilities that are averaged over the heads.

        Args:
            x: (R, C, pooled_h, pooled_w), the pooled features of all instances of all images.
            instances: detections of each image, with pred_boxes and pred_classes; gets pred_masks, (R, 1, h, w).
        """
        masks_per_head = []
        for head in self:
            head(x, instances)
            masks_per_head.append([one_image.pred_masks for one_image in instances])
        for one_image, masks in zip(instances, zip(*masks_per_head)):
            one_image.pred_masks = torch.stack(masks).mean(dim=0)
        return instances
