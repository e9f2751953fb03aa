# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What all layers share: the check of their input, and how offset branches run under autocast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn


def offset_branch(branch: nn.Conv2d, x: Tensor) -> Tensor:
    """Runs the convolution that predicts offsets, in float32 under autocast on CPU.

    In bfloat16, offsets of some pixels are a hundredth of a pixel off. Where that takes a sample over a pixel's border,
    its gradient jumps. The gradients of the input and the branch were 10 % off in bfloat16, and 0.4 % in float32. The
    operators on CUDA read offsets in the dtype of the input, so float32 would gain nothing there.
    """
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or x.dtype == torch.float64:
        return branch(x)
    with torch.autocast("cpu", enabled=False):
        return branch(x.to(branch.weight.dtype))


class DeformableLayer(nn.Module):
    """A layer whose input has a fixed number of channels."""

    if TYPE_CHECKING:  # torch.jit.script would read annotations of a class, which are only texts here
        in_channels: int

    def _check_in_channels(self, x: Tensor) -> None:
        # The operators cannot check it: they take twice the channels for two conv groups, and pool any number of them.
        if x.dim() == 4 and x.shape[1] != self.in_channels:
            given = f"the input must have in_channels={self.in_channels} channels, got {x.shape[1]}"
            if torch.jit.is_scripting():
                raise RuntimeError(given)
            else:  # names of types and lists in a text are nothing for TorchScript
                raise RuntimeError(f"{type(self).__name__}: {given} (shape {list(x.shape)})")
