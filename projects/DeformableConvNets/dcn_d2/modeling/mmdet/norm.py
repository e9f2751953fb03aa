# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""MMDetection's way of fine-tuning with BatchNorm: fixed statistics, trained weight and bias (`norm_eval=True`)."""

from __future__ import annotations

from torch import nn


class FixedStatsBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that always uses its running statistics and never updates them; weight and bias train.

    Detectron2's "BN" learns its statistics, and in its "FrozenBN" weight and bias are fixed too.
    """

    def train(self, mode: bool = True) -> FixedStatsBatchNorm2d:
        """Stays in evaluation mode, also when the model around it trains."""
        super().train(False)
        return self


def fix_batch_norm_statistics(module: nn.Module) -> None:
    """Replaces every BatchNorm2d and SyncBatchNorm below `module`, sharing their parameters and buffers.

    Fixed statistics need no synchronisation, so both become the same layer.
    """
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            setattr(module, name, _fixed(child))
        else:
            fix_batch_norm_statistics(child)


def _fixed(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> FixedStatsBatchNorm2d:
    if not norm.track_running_stats:
        raise ValueError(f"{norm} keeps no running statistics, so they cannot be fixed")
    fixed = FixedStatsBatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine)
    for name, value in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
        setattr(fixed, name, value)
    return fixed.train()
