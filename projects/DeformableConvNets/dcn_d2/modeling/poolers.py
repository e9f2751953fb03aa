# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable RoI poolers for all levels of an FPN: Detectron2's `ROIPooler` with layers that the config names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import torch
from detectron2.config import CfgNode
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels, convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..config import with_dcn_keys
from ..layers import DeformPSRoIPool, DeformRoIPool, ModulatedDeformPSRoIPool, ModulatedDeformRoIPool
from ..ops import deform_roi_pool
from ..ops.portable import are_portable

ROI_POOLER_REGISTRY = Registry("ROI_POOLER")
ROI_POOLER_REGISTRY.__doc__ = """
Poolers that POOLER_TYPE of MODEL.ROI_BOX_HEAD, ROI_MASK_HEAD and ROI_KEYPOINT_HEAD may name, besides Detectron2's.

A registered object is called once for each FPN level, with the keywords

- output_size: bins a side, a number,
- spatial_scale: size of the level's feature map divided by the size of the image,
- in_channels: channels of the feature map,
- deform_fc_channels: MODEL.DCN.POOLER_FC_DIM,
- sampling_ratio: POOLER_SAMPLING_RATIO of the head's config; 0 leaves the choice to the pooler,

and returns a module that maps an (N, in_channels, H, W) feature map and (R, 5) RoIs, (batch index, x0, y0, x1, y1) in
image pixels, to (R, in_channels, output_size, output_size) of the map's dtype, also under autocast. The RoIs are
float32 for maps of every dtype. It is also called without RoIs. Its parameters must get a gradient then too, of zeros:
distributed training waits for the gradients of all parameters.
"""

for _layer in (DeformRoIPool, ModulatedDeformRoIPool, DeformPSRoIPool, ModulatedDeformPSRoIPool):
    ROI_POOLER_REGISTRY.register(_layer)


class DCNROIPooler(ROIPooler):
    """Detectron2's `ROIPooler`, with another pooler on each level, MMDetection's choice of levels, or both.

    Args:
        output_size: bins a side.
        scales: size of each level's feature map divided by the size of the image. The finest comes first, and each is
            half of the one before.
        sampling_ratio: samples a side of a bin; 0 is adaptive.
        pooler_type: a type that Detectron2 knows.
        level_pooler: makes the pooler of a level from its scale, in place of that of `pooler_type`.
        mmdet_levels: choose the level of a box with MMDetection's formula.
    """

    def __init__(
        self,
        output_size: int,
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str,
        level_pooler: Callable[[float], nn.Module] | None = None,
        mmdet_levels: bool = False,
    ) -> None:
        super().__init__(output_size, scales, sampling_ratio, pooler_type)
        if level_pooler is not None:
            self.level_poolers = nn.ModuleList(level_pooler(scale) for scale in scales)
        self.mmdet_levels = mmdet_levels

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Pools each box from the feature map of the level that its size belongs to.

        Args:
            x: the feature map of each level, (N, C, H, W) tensors, finest first.
            box_lists: the boxes of each of the N images, in pixels of the image.

        Returns:
            (R, C, output_size, output_size), where R is the number of all boxes, image by image.
        """
        if len(box_lists) == 0 or len(x) != len(self.level_poolers):
            return super().forward(x, box_lists)  # an empty result, or an error
        return pool_rois(self, x, convert_boxes_to_pooler_format(box_lists))

    def _mmdet_levels(self, areas: Tensor) -> Tensor:
        """Gives the index of the level of boxes of these areas, 0 for the finest: a tensor (R,).

        MMDetection computes floor(log2(size / 56 + 1e-6)), and Detectron2 floor(4 + log2(size / 224 + 1e-8)) - 2. They
        differ for boxes a hair smaller than 112, 224 and 448 pixels.
        """
        finest = self.canonical_box_size / 2 ** (self.canonical_level - self.min_level)
        levels = torch.floor(torch.log2(areas.sqrt() / finest + 1e-6))
        return levels.clamp(min=0, max=len(self.level_poolers) - 1).long()


def pool_rois(pooler: ROIPooler, features: Sequence[Tensor], rois: Tensor) -> Tensor:
    """Pools each RoI from the feature map of the level that its size belongs to.

    It computes `pooler(features, boxes)` without lists of boxes. torch.export, torch.jit.trace and torch.onnx can
    follow it for maps and batches of every size and for every number of RoIs, also none.

    Args:
        pooler: a `DCNROIPooler` or one of Detectron2's.
        features: the feature map of each level, (N, C, H, W) tensors, finest first.
        rois: (R, 5) of (batch index, x0, y0, x1, y1) in image pixels, in any order; for ROIAlignRotated (R, 6) of
            (batch index, centre x, centre y, width, height, angle).

    Returns:
        (R, C, output_size, output_size).
    """
    if len(pooler.level_poolers) == 1:
        return _pool_level(pooler.level_poolers[0], features[0], rois)
    sizes = rois[:, 3:5] if rois.shape[1] == 6 else rois[:, 3:5] - rois[:, 1:3]
    levels = _levels(pooler, sizes[:, 0] * sizes[:, 1])
    pooled = features[0].new_zeros(rois.shape[0], features[0].shape[1], *pooler.output_size)
    for level, (level_pooler, map_of_level) in enumerate(zip(pooler.level_poolers, features)):
        (indices,) = (levels == level).nonzero(as_tuple=True)
        # Also without indices: through this, the parameters of a level without RoIs get gradients, of zeros. In place:
        # OpenVINO knows no other form of index_put.
        pooled.index_put_((indices,), _pool_level(level_pooler, map_of_level, rois[indices]))
    return pooled


def _pool_level(pooler: nn.Module, features: Tensor, rois: Tensor) -> Tensor:
    """Pools all RoIs from one map.

    Detectron2's RoIAlign rounds RoIs to the dtype of the map. For a RoI of no area, it is NaN in OpenVINO. So for other
    runtimes it is recorded as the operator that is RoIAlign without offsets.
    """
    if are_portable() and isinstance(pooler, ROIAlign) and pooler.aligned:
        return deform_roi_pool(
            features, rois, None, pooler.output_size, pooler.spatial_scale, max(pooler.sampling_ratio, 0)
        )
    return pooler(features, rois)


def _levels(pooler: ROIPooler, areas: Tensor) -> Tensor:
    """Gives the index of the level of boxes of these areas, 0 for the finest: a tensor (R,)."""
    if isinstance(pooler, DCNROIPooler) and pooler.mmdet_levels:
        return pooler._mmdet_levels(areas)
    boxes = SimpleNamespace(area=lambda: areas)  # all that Detectron2's rule asks of boxes
    return assign_boxes_to_levels(
        [boxes], pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level
    )


def assign_levels(pooler: ROIPooler, box_lists: list[Boxes]) -> Tensor:
    """Gives the index of the feature map from which `pooler` pools each box: (R,), 0 for the finest map.

    Args:
        pooler: a `DCNROIPooler` or one of Detectron2's.
        box_lists: the boxes of each image.
    """
    return _levels(pooler, torch.cat([boxes.area() for boxes in box_lists]))


def build_roi_pooler(cfg: CfgNode, head: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> ROIPooler:
    """Builds the pooler of a head of the ROI heads.

    Args:
        cfg: the config; reads MODEL.ROI_HEADS.IN_FEATURES, MODEL.DCN.POOLER_FC_DIM and MODEL.DCN.POOLER_MMDET_LEVELS.
        head: node of the head, such as MODEL.ROI_BOX_HEAD; reads POOLER_TYPE, POOLER_RESOLUTION and
            POOLER_SAMPLING_RATIO. Detectron2's `ROIPooler` builds a type that is not in `ROI_POOLER_REGISTRY`.
        input_shape: channels and stride of each feature map of the backbone, by its name.
    """
    dcn = with_dcn_keys(cfg).MODEL.DCN
    shapes = [input_shape[name] for name in cfg.MODEL.ROI_HEADS.IN_FEATURES]
    scales = tuple(1.0 / shape.stride for shape in shapes)
    resolution, sampling_ratio = head.POOLER_RESOLUTION, head.POOLER_SAMPLING_RATIO
    mmdet_levels = dcn.POOLER_MMDET_LEVELS
    if head.POOLER_TYPE not in ROI_POOLER_REGISTRY:
        if not mmdet_levels:
            return ROIPooler(resolution, scales, sampling_ratio, head.POOLER_TYPE)
        return DCNROIPooler(resolution, scales, sampling_ratio, head.POOLER_TYPE, mmdet_levels=True)
    registered = ROI_POOLER_REGISTRY.get(head.POOLER_TYPE)

    def level_pooler(scale: float) -> nn.Module:
        return registered(
            output_size=resolution,
            spatial_scale=scale,
            in_channels=shapes[0].channels,
            deform_fc_channels=dcn.POOLER_FC_DIM,
            sampling_ratio=sampling_ratio,
        )

    # `ROIPooler` must be given a type that it knows. The poolers that it makes are replaced.
    return DCNROIPooler(resolution, scales, sampling_ratio, "ROIAlignV2", level_pooler, mmdet_levels)
