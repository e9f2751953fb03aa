# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What all layers share."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor, nn


class DeformableLayer(nn.Module):
    """A layer whose input has a fixed number of channels."""

    in_channels: int

    def _check_in_channels(self, x: Tensor) -> None:
        # The operators cannot: to them, twice the channels are two conv groups, and pooling takes any number.
        if x.dim() == 4 and x.shape[1] != self.in_channels:
            raise RuntimeError(
                f"{type(self).__name__}: the input must have in_channels={self.in_channels} channels, got "
                f"{x.shape[1]} (shape {list(x.shape)})"
            )

    def __prepare_scriptable__(self) -> NoReturn:  # what torch.jit.script calls first, also for parts of a model
        raise RuntimeError(
            f"{type(self).__name__} cannot be compiled by torch.jit.script. Use torch.export.export, torch.compile or "
            "torch.jit.trace; of what dcn_d2 has, only the operators, such as dcn_d2.ops.deform_conv2d, may be called "
            "in scripted functions."
        )
