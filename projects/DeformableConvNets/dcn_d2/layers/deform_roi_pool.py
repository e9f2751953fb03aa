# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable RoI pooling layers, v1 and v2 (modulated), which predict their offsets from the undeformed pooling."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import deform_roi_pool
from ..ops._arguments import integer, number, pair
from ._layer import DeformableLayer


def _zero_init(linear: nn.Linear) -> nn.Linear:
    """Sets the weight and bias of a layer to zero, and gives it back."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class PoolWithOffsetBranch(DeformableLayer):
    """What the deformable RoI pooling layers share: the branches that predict offsets and masks.

    Parameters have the names of MMDetection's models: `offset_fc.{0,2,4}` and, if modulated, `mask_fc.{0,2}`. The last
    layer of each branch starts with zeros. A subclass says which operator pools. Arguments as for `DeformRoIPool`.
    """

    modulated = False
    __constants__ = ("modulated",)  # so that torch.jit.script leaves out the branch that is not there

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        in_channels: int,
        deform_fc_channels: int = 1024,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ) -> None:
        super().__init__()
        in_channels = integer(in_channels, "in_channels")
        deform_fc_channels = integer(deform_fc_channels, "deform_fc_channels")
        out_h, out_w = pair(output_size, "output_size")
        bins = out_h * out_w
        self.output_size = out_h, out_w
        self.spatial_scale = number(spatial_scale, "spatial_scale")
        self.in_channels = in_channels
        self.deform_fc_channels = deform_fc_channels
        self.sampling_ratio = integer(sampling_ratio, "sampling_ratio")
        self.gamma = number(gamma, "gamma")
        self.offset_fc = nn.Sequential(
            nn.Linear(in_channels * bins, deform_fc_channels),
            nn.ReLU(inplace=True),
            nn.Linear(deform_fc_channels, deform_fc_channels),
            nn.ReLU(inplace=True),
            _zero_init(nn.Linear(deform_fc_channels, 2 * bins)),
        )
        if self.modulated:
            self.mask_fc = nn.Sequential(
                nn.Linear(in_channels * bins, deform_fc_channels),
                nn.ReLU(inplace=True),
                _zero_init(nn.Linear(deform_fc_channels, bins)),
                nn.Sigmoid(),
            )

    def forward(self, x: Tensor, rois: Tensor) -> Tensor:
        """Pools (N, in_channels, H, W) `x` over (R, 5) `rois`, (batch index, x0, y0, x1, y1) in image pixels.

        Returns:
            (R, in_channels, output_h, output_w), of the dtype of `x`, also under autocast. Without RoIs it is an empty
            tensor, and all parameters still get gradients, of zeros.

        Raises:
            RuntimeError: `x` has another number of channels than the layer, or the operator refuses its operands.
        """
        self._check_in_channels(x)
        plain = self._pool(x, rois, None, None).flatten(1)
        out_h, out_w = self.output_size
        offset = self.offset_fc(plain).unflatten(1, [2, out_h, out_w])  # x before y
        mask: Tensor | None = None
        if self.modulated:
            mask = self.mask_fc(plain).unflatten(1, [1, out_h, out_w])
        # Autocast pools float32 maps in half precision. Detectron2's `ROIPooler` collects the results of all levels in
        # a tensor of the maps' dtype, so each must have that dtype.
        return self._pool(x, rois, offset, mask).to(x.dtype)

    def _pool(self, x: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None) -> Tensor:
        """Runs the operator. Without `offset` and `mask` it gives the undeformed pooling, which both branches read."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        names = "output_size spatial_scale in_channels deform_fc_channels sampling_ratio gamma".split()
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class DeformRoIPool(PoolWithOffsetBranch):
    """Deformable RoI pooling: RoIAlign whose bins move by offsets predicted from the undeformed pooling.

    It starts as RoIAlign (aligned, adaptive sampling): the last layer of the offset branch starts with zeros.
    Source: Dai et al., "Deformable Convolutional Networks", ICCV 2017, section 2.2; numerics of mmcv's
    `deform_roi_pool`, and the parameter names of MMDetection's models, `offset_fc.{0,2,4}`.

    Args:
        output_size: bins a side, a number or (height, width).
        spatial_scale: size of the feature map over size of the image.
        in_channels: channels of the feature map, and so of the output.
        deform_fc_channels: width of the hidden layers of the branches.
        sampling_ratio: samples a side of a bin; 0 takes one for each feature-map pixel that a bin spans, rounded up.
        gamma: an offset of 1 moves a bin by this share of the RoI's width or height.

    Example:
        >>> import torch
        >>> from dcn_d2.layers import DeformRoIPool
        >>> pool = DeformRoIPool(output_size=7, spatial_scale=1 / 16, in_channels=8, deform_fc_channels=16)
        >>> rois = torch.tensor([[0, 10.0, 20.0, 150.0, 90.0], [1, 0.0, 0.0, 64.0, 64.0]])  # image, x0, y0, x1, y1
        >>> pool(torch.rand(2, 8, 10, 12), rois).shape
        torch.Size([2, 8, 7, 7])
    """

    def _pool(self, x: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None) -> Tensor:
        return deform_roi_pool(
            x, rois, offset, self.output_size, self.spatial_scale, self.sampling_ratio, self.gamma, mask
        )


class ModulatedDeformRoIPool(DeformRoIPool):
    """Deformable RoI pooling whose bins are also scaled, by factors in (0, 1) predicted from the undeformed pooling.

    It starts as half of RoIAlign: all factors are 0.5. Arguments as for `DeformRoIPool`. Source: Zhu et al.,
    "Deformable ConvNets v2: More Deformable, Better Results", CVPR 2019. Parameters `offset_fc.{0,2,4}` and
    `mask_fc.{0,2}`.

    Example:
        >>> import torch
        >>> from dcn_d2.layers import ModulatedDeformRoIPool
        >>> pool = ModulatedDeformRoIPool(output_size=7, spatial_scale=1 / 16, in_channels=8, deform_fc_channels=16)
        >>> rois = torch.tensor([[0, 10.0, 20.0, 150.0, 90.0], [1, 0.0, 0.0, 64.0, 64.0]])  # image, x0, y0, x1, y1
        >>> pool(torch.rand(2, 8, 10, 12), rois).shape
        torch.Size([2, 8, 7, 7])
    """

    modulated = True
