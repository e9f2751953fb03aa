# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The config keys of dcn_d2. All default to Detectron2's behaviour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg


def add_dcn_config(cfg: CN) -> None:
    """Adds the keys below to `cfg` and registers everything of dcn_d2 with Detectron2.

    Keys that `cfg` has already keep their values, so a second call changes nothing. Registered are the backbones, the
    data sets `nuclei_train` and `nuclei_val`, dcn_d2's layers in Detectron2's own deformable ResNet block, and the
    addresses of foreign weights that MODEL.WEIGHTS may have.
    """
    from . import checkpoint, data, modeling  # noqa: F401  the last two register what they have when imported

    modeling.use_dcn_layers_in_detectron2()
    checkpoint.register_path_handlers()

    def add(node: CN, key: str, default: Any) -> Any:
        if key not in node:
            node[key] = default
        return node[key]

    dcn = add(cfg.MODEL, "DCN", CN())
    # Every BatchNorm of the ResNet uses its running statistics and leaves them as they are, also in training, while
    # its weight and bias train (MMDetection's norm_eval). Other norms are left alone.
    add(dcn, "NORM_EVAL", False)

    # Memory format of the weights of dcn_d2's backbones, and with them of all feature maps: "contiguous",
    # "channels_last", or "auto": channels_last on CPU, where it was measured to be the faster one, else contiguous.
    # (On an H200 in float16, channels_last made inference of a Faster R-CNN 9 % faster and training 4 % slower.)
    # Results are the same up to rounding.
    add(dcn, "MEMORY_FORMAT", "auto")

    # Width of the hidden layers that predict offsets and masks in the RoI poolers of dcn_d2, which POOLER_TYPE of
    # MODEL.ROI_BOX_HEAD names: DeformPSRoIPool, ModulatedDeformPSRoIPool, DeformRoIPool, ModulatedDeformRoIPool.
    add(dcn, "POOLER_FC_DIM", 1024)
    # DCNROIHeads and DCNCascadeROIHeads choose the FPN level of a box with MMDetection's formula, which differs from
    # Detectron2's for boxes a hair smaller than 112, 224 and 448 pixels.
    add(dcn, "POOLER_MMDET_LEVELS", False)

    # The rest of MODEL.DCN changes training only, but for CASCADE_AVERAGE_LOGITS and CASCADE_MASK_HEADS.
    # With the proposal generator DCNRPN, ground truth takes over the anchors of its highest IoU if that is at least
    # this; -1 is Detectron2's rule: no minimum, and an anchor keeps the ground truth of its own highest IoU.
    add(dcn, "RPN_LOW_QUALITY_IOU", -1.0)
    # DCNRPN leaves out of matching and sampling the anchors whose centre lies outside the image padded to multiples of
    # this, and those that RPN.BOUNDARY_THRESH excludes; 0 is Detectron2's rule, all anchors of the batch take part.
    add(dcn, "RPN_PADDING_DIVISOR", 0)
    # The losses of DCNRPN are averages over the sampled anchors, and not sums over RPN.BATCH_SIZE_PER_IMAGE.
    add(dcn, "RPN_LOSS_PER_SAMPLE", False)
    # As RPN_LOW_QUALITY_IOU, for the proposals of DCNROIHeads and DCNCascadeROIHeads; -1: such matches do not exist.
    add(dcn, "ROI_LOW_QUALITY_IOU", -1.0)

    # DCNCascadeROIHeads scores with the softmax of the stages' mean logits, not with the mean of their probabilities.
    add(dcn, "CASCADE_AVERAGE_LOGITS", False)
    # DCNCascadeROIHeads has a mask head for each stage, and averages their masks at test time.
    add(dcn, "CASCADE_MASK_HEADS", False)
    # Each stage of DCNCascadeROIHeads samples anew from the boxes of the stage before and the ground truth.
    add(dcn, "CASCADE_RESAMPLE", False)
    # Factors of the losses of each stage of DCNCascadeROIHeads; empty is 1 for all.
    add(dcn, "CASCADE_LOSS_WEIGHTS", ())
    # Each of S stages of DCNCascadeROIHeads passes 1 / S of its gradient on to the pooled features.
    add(dcn, "CASCADE_SCALE_GRADIENTS", True)

    # What resizes images in dcn_d2's trainer and predictor: "PIL", which Detectron2 uses, or "cv2", MMDetection's way.
    add(cfg.INPUT, "RESIZE_WITH", "PIL")

    # Batch size that SOLVER.BASE_LR is meant for: with another IMS_PER_BATCH, train_net.py scales BASE_LR linearly and
    # says so. 0 leaves BASE_LR alone.
    add(cfg.SOLVER, "REFERENCE_IMS_PER_BATCH", 0)

    # Factor on the learning rate of the convolutions that predict offsets and modulation, as MMEngine's
    # dcn_offset_lr_mult. From scratch, a small one keeps samples near their regular positions at first.
    add(cfg.SOLVER, "OFFSET_LR_FACTOR", 1.0)

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


def load_config(config_file: str, opts: Sequence[str] = ()) -> CN:
    """Reads a config with dcn_d2's keys.

    Args:
        config_file: path of a YAML; "" gives the defaults.
        opts: KEY VALUE pairs that override it.
    """
    cfg = get_cfg()
    add_dcn_config(cfg)
    if config_file:
        cfg.merge_from_file(config_file)
    cfg.merge_from_list(list(opts))
    return cfg
