# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The original deformable RoI pooling of DCNv1 and v2 as layers, with the parameters of `DeformRoIPool`."""

from __future__ import annotations

from torch import Tensor

from ..ops import deform_psroi_pool
from .deform_roi_pool import PoolWithOffsetBranch


class DeformPSRoIPool(PoolWithOffsetBranch):
    """Deformable RoI pooling as the authors of DCNv1 computed it, with offsets from the undeformed pooling.

    MMDetection's published dpool model was trained and scored with it. It has the parameters of `DeformRoIPool`, but
    computes other numbers: `dcn_d2.ops.deform_psroi_pool` says which. Its group size is 1, so it is not
    position-sensitive in spite of its name.

    Source: Dai et al., "Deformable Convolutional Networks", ICCV 2017, section 2.2, and the authors' code.

    Args:
        output_size: bins a side, a number or (height, width).
        spatial_scale: size of the feature map over size of the image.
        in_channels: channels of the feature map, and so of the output.
        deform_fc_channels: width of the hidden layers of the branches.
        sampling_ratio: samples a side of a bin (sample_per_part of the operator); 0 takes the authors' 4.
        gamma: an offset of 1 moves a bin by this share of the RoI's width or height (trans_std of the operator).

    Example:
        >>> import torch
        >>> from dcn_d2.layers import DeformPSRoIPool
        >>> pool = DeformPSRoIPool(output_size=7, spatial_scale=1 / 16, in_channels=8, deform_fc_channels=16)
        >>> rois = torch.tensor([[0, 10.0, 20.0, 150.0, 90.0], [1, 0.0, 0.0, 64.0, 64.0]])  # image, x0, y0, x1, y1
        >>> pool(torch.rand(2, 8, 10, 12), rois).shape
        torch.Size([2, 8, 7, 7])
    """

    def _pool(self, x: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None) -> Tensor:
        samples = self.sampling_ratio
        if samples == 0:
            samples = 4  # as in DCNv1 and v2, and so in the published models
        return deform_psroi_pool(
            x,
            rois,
            offset,
            self.output_size,
            self.spatial_scale,
            sample_per_part=samples,
            trans_std=self.gamma,
            mask=mask,
        )


class ModulatedDeformPSRoIPool(DeformPSRoIPool):
    """The pooling of `DeformPSRoIPool` with a factor in (0, 1) for each bin, as in DCNv2; all factors start at 0.5.

    MMDetection's published mdpool model was trained and scored with it. Arguments as for `DeformPSRoIPool`. Source: Zhu
    et al., "Deformable ConvNets v2: More Deformable, Better Results", CVPR 2019.

    Example:
        >>> import torch
        >>> from dcn_d2.layers import ModulatedDeformPSRoIPool
        >>> pool = ModulatedDeformPSRoIPool(output_size=7, spatial_scale=1 / 16, in_channels=8, deform_fc_channels=16)
        >>> rois = torch.tensor([[0, 10.0, 20.0, 150.0, 90.0], [1, 0.0, 0.0, 64.0, 64.0]])  # image, x0, y0, x1, y1
        >>> pool(torch.rand(2, 8, 10, 12), rois).shape
        torch.Size([2, 8, 7, 7])
    """

    modulated = True
