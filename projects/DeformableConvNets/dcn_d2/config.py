# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The config keys of dcn_d2. All default to Detectron2's behaviour."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode as CN


def add_dcn_config(cfg: CN) -> None:
    """Adds the keys below to `cfg` and registers everything of dcn_d2 with Detectron2.

    Keys that `cfg` has already keep their values, so a second call changes nothing. Registered are the backbones, the
    data sets `nuclei_train` and `nuclei_val`, and dcn_d2's layers in Detectron2's own deformable ResNet block.
    """
    from . import data, modeling  # noqa: F401  both register what they have when they are imported

    modeling.use_dcn_layers_in_detectron2()

    def add(node: CN, key: str, default: Any) -> Any:
        if key not in node:
            node[key] = default
        return node[key]

    dcn = add(cfg.MODEL, "DCN", CN())
    # Every BatchNorm of the ResNet uses its running statistics and leaves them as they are, also in training, while
    # its weight and bias train (MMDetection's norm_eval). Other norms are left alone.
    add(dcn, "NORM_EVAL", False)

    # Batch size that SOLVER.BASE_LR is meant for: with another IMS_PER_BATCH, train_net.py scales BASE_LR linearly and
    # says so. 0 leaves BASE_LR alone.
    add(cfg.SOLVER, "REFERENCE_IMS_PER_BATCH", 0)

    # What is published for a row of the zoo; nothing that builds or trains a model reads it.
    published = add(cfg, "PUBLISHED", CN())
    # Address of the weights; "" where there are none.
    add(published, "WEIGHTS", "")
    # Address of the log of their training; "" where there is none.
    add(published, "LOG", "")
    # Box AP of the weights on COCO val2017, in percent; 0 where it is not known.
    add(published, "BOX_AP", 0.0)
    # Mask AP of the weights on COCO val2017, in percent; 0 for a model without masks.
    add(published, "MASK_AP", 0.0)
