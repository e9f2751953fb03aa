# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The rules by which MMDetection trains and predicts, where they differ from Detectron2's.

None of them is about deformable layers. They are here because the published models were trained with them. Each is
behind a key of MODEL.DCN, and the keys' defaults are Detectron2's rules.
"""

from .cascade import MMDetCascadeROIHeads
from .mask_heads import MaskHeadPerStage
from .matcher import MinimumIoUMatcher
from .norm import FixedStatsBatchNorm2d, fix_batch_norm_statistics
from .rpn import DCNRPN

__all__ = [
    "DCNRPN",
    "FixedStatsBatchNorm2d",
    "MMDetCascadeROIHeads",
    "MaskHeadPerStage",
    "MinimumIoUMatcher",
    "fix_batch_norm_statistics",
]
