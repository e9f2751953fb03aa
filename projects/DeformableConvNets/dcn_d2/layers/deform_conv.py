# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Deformable convolution layers, v1 and v2 (modulated), with the interface of Detectron2's classes of these names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops import deform_conv2d, modulated_deform_conv2d, split_offset_and_mask
from ..ops._arguments import integer, integer_or_pair, pair
from ._layer import DeformableLayer, offset_branch

IntOrPair = int | tuple[int, int]


def _pair(value: IntOrPair, name: str) -> tuple[int, int]:
    height, width = pair(value, name)
    return height, width


class _DeformConvBase(DeformableLayer):
    """What the layers of this file share: parameters, checks, and norm and activation after the operator.

    Its constructor is that of `ModulatedDeformConv`.
    """

    if TYPE_CHECKING:  # see DeformableLayer
        norm: nn.Module | None
        activation: Callable[[Tensor], Tensor] | None
        bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = True,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        in_channels, out_channels = integer(in_channels, "in_channels"), integer(out_channels, "out_channels")
        groups, deformable_groups = integer(groups, "groups"), integer(deformable_groups, "deformable_groups")
        # That in_channels is a multiple of deformable_groups is left to the operator: Detectron2's classes can be
        # built, though not used, without it.
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if groups < 1 or channels % groups:
                raise ValueError(f"{name} must be a multiple of groups, got {channels} and {groups}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size, "kernel_size")
        self.stride = integer_or_pair(stride, "stride")
        self.padding = integer_or_pair(padding, "padding")
        self.dilation = integer_or_pair(dilation, "dilation")
        self.groups = groups
        self.deformable_groups = deformable_groups
        self.norm = norm
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels)) if bias else None)
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def _check_channels(self, name: str, tensor: Tensor, channels_per_tap: int) -> None:
        # The operator infers the number of deform groups from the offsets. Only the layer knows how many it should be.
        channels = channels_per_tap * self.deformable_groups * self.kernel_size[0] * self.kernel_size[1]
        if tensor.shape[1] != channels:
            message = (
                f"{name} must have {channels} channels for deformable_groups={self.deformable_groups} and "
                f"kernel_size={self.kernel_size}, got {tensor.shape[1]}"
            )
            if torch.jit.is_scripting():
                raise RuntimeError(message)
            else:
                raise RuntimeError(f"{type(self).__name__}: {message}")

    def _convolve(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        self._check_in_channels(x)
        self._check_channels("offset", offset, 2)
        if mask is not None:
            self._check_channels("mask", mask, 1)
        out = deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)
        return self._finish(x, out)

    def _finish(self, x: Tensor, out: Tensor) -> Tensor:
        if x.numel() == 0:
            return out  # as Detectron2 does: an empty batch would turn the statistics of a BatchNorm into NaN
        if self.norm is not None:
            out = self.norm(out)
        if self.activation is not None:
            out = self.activation(out)
        return out

    def _offset_branch(self, channels_per_tap: int) -> nn.Conv2d:
        """Makes a dense convolution from the layer's input to its offsets, which starts with zeros everywhere."""
        branch = nn.Conv2d(
            self.in_channels,
            channels_per_tap * self.deformable_groups * self.kernel_size[0] * self.kernel_size[1],
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        nn.init.zeros_(branch.weight)
        assert branch.bias is not None
        nn.init.zeros_(branch.bias)
        return branch

    def extra_repr(self) -> str:
        names = "in_channels out_channels kernel_size stride padding dilation groups deformable_groups".split()
        return ", ".join([f"{name}={getattr(self, name)}" for name in names] + [f"bias={self.bias is not None}"])


class DeformConv(_DeformConvBase):
    """Deformable convolution (v1): the caller gives the offsets.

    A drop-in for `detectron2.layers.DeformConv` that also works on CPU, for every number of groups, forward and
    backward. Source: Dai et al., "Deformable Convolutional Networks", ICCV 2017.

    Args:
        in_channels: a multiple of `groups` and of `deformable_groups`.
        out_channels: a multiple of `groups`.
        kernel_size: a number or (height, width).
        stride: a number or (height, width).
        padding: of zeros, a number or (height, width).
        dilation: a number or (height, width).
        groups: conv groups.
        deformable_groups: the input channels are divided into this many groups, each with offsets of its own.
        bias: must be False. The argument exists because Detectron2's class has it.
        norm: a module applied to the output.
        activation: a function applied after the norm; for torch.jit.script a module, such as nn.ReLU().

    Example:
        >>> import torch
        >>> from dcn_d2.layers import DeformConv
        >>> layer = DeformConv(4, 8, kernel_size=3, padding=1)
        >>> offset = torch.zeros(1, 18, 5, 6)  # (y, x) of 9 taps at 5 x 6 places
        >>> layer(torch.zeros(1, 4, 5, 6), offset).shape
        torch.Size([1, 8, 5, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = False,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if bias:
            raise ValueError(f"{type(self).__name__} has no bias, got bias={bias}; ModulatedDeformConv has one")
        stride, padding, dilation = _pair(stride, "stride"), _pair(padding, "padding"), _pair(dilation, "dilation")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            deformable_groups,
            False,
            norm,
            activation,
        )

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Convolves (N, in_channels, H, W) `x`.

        Args:
            x: the input.
            offset: (N, 2 * deformable_groups * kernel_h * kernel_w, out_h, out_w), see `dcn_d2.ops.deform_conv2d`.
        """
        return self._convolve(x, offset)


class ModulatedDeformConv(_DeformConvBase):
    """Modulated deformable convolution (v2): the caller gives the offsets and the modulation.

    A drop-in for `detectron2.layers.ModulatedDeformConv` that also works on CPU. It takes the arguments of
    `DeformConv`, but `bias` may be True, and is by default.

    Source: Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", CVPR 2019.

    Example:
        >>> import torch
        >>> from dcn_d2.layers import ModulatedDeformConv
        >>> layer = ModulatedDeformConv(4, 8, kernel_size=3, padding=1)
        >>> x, offset, mask = torch.zeros(1, 4, 5, 6), torch.zeros(1, 18, 5, 6), torch.ones(1, 9, 5, 6)
        >>> layer(x, offset, mask).shape
        torch.Size([1, 8, 5, 6])
        >>> layer(x, torch.zeros(1, 27, 5, 6)).shape  # a branch's output: offsets, and logits of the mask
        torch.Size([1, 8, 5, 6])
    """

    @property
    def with_bias(self) -> bool:
        """Whether there is a bias, under the name that Detectron2's class has for it."""
        return self.bias is not None

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolves (N, in_channels, H, W) `x`.

        Args:
            x: the input.
            offset: (N, 2 * deformable_groups * kernel_h * kernel_w, out_h, out_w), see `dcn_d2.ops.deform_conv2d`; or,
                without `mask`, an offset branch's output, (N, 3 * deformable_groups * kernel_h * kernel_w, out_h,
                out_w), see `dcn_d2.ops.modulated_deform_conv2d`.
            mask: (N, deformable_groups * kernel_h * kernel_w, out_h, out_w), the factor of every sample.
        """
        if mask is not None:
            return self._convolve(x, offset, mask)
        return self._convolve_by_branch(x, offset)

    def _convolve_by_branch(self, x: Tensor, offset_and_mask: Tensor) -> Tensor:
        self._check_in_channels(x)
        self._check_channels("offset (the branch's output, as there is no mask)", offset_and_mask, 3)
        if torch.jit.is_scripting():  # the question below is nothing for TorchScript
            pass
        elif torch.jit.is_tracing() or torch.compiler.is_exporting():
            # Other runtimes know this operator, and not the one below.
            return self._convolve(x, *split_offset_and_mask(offset_and_mask))
        out = modulated_deform_conv2d(
            x, offset_and_mask, self.weight, self.bias, self.stride, self.padding, self.dilation
        )
        return self._finish(x, out)


class DeformConvPack(DeformConv):
    """`DeformConv` with its own offset branch `conv_offset`; it starts as a plain convolution.

    Takes the arguments of `DeformConv`. Parameters are named as in mmcv's `DeformConv2dPack`.

    Example:
        >>> import torch
        >>> from dcn_d2.layers import DeformConvPack
        >>> layer = DeformConvPack(4, 8, kernel_size=3, padding=1)
        >>> x = torch.rand(1, 4, 5, 6)
        >>> torch.allclose(layer(x), torch.nn.functional.conv2d(x, layer.weight, padding=1), atol=1e-5)
        True
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv_offset = self._offset_branch(2)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Convolves (N, in_channels, H, W) `x` at positions that it predicts from `x`."""
        self._check_in_channels(x)  # before the branch fails for the same reason
        if torch.jit.is_scripting():
            return self._convolve(x, self.conv_offset(x))
        return self._convolve(x, offset_branch(self.conv_offset, x))


class ModulatedDeformConvPack(ModulatedDeformConv):
    """`ModulatedDeformConv` with its own branch `conv_offset` for offsets and modulation.

    It starts as half a plain convolution: the modulation is 0.5 everywhere. Takes the arguments of
    `ModulatedDeformConv`. Parameters are named as in mmcv's `ModulatedDeformConv2dPack`.

    Example:
        >>> import torch
        >>> from dcn_d2.layers import ModulatedDeformConvPack
        >>> layer = ModulatedDeformConvPack(4, 8, kernel_size=3, padding=1, bias=False)
        >>> x = torch.rand(1, 4, 5, 6)
        >>> torch.allclose(layer(x), torch.nn.functional.conv2d(x, layer.weight, padding=1) / 2, atol=1e-5)
        True
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv_offset = self._offset_branch(3)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Convolves (N, in_channels, H, W) `x` at positions and with factors that it predicts from `x`."""
        self._check_in_channels(x)  # before the branch fails for the same reason
        if torch.jit.is_scripting():
            return self._convolve_by_branch(x, self.conv_offset(x))
        return self._convolve_by_branch(x, offset_branch(self.conv_offset, x))
