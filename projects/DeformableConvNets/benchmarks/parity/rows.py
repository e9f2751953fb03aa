# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The rows that are compared, MMDetection's configs of them, and what counts as equal."""

from __future__ import annotations

# Row of dcn_d2's zoo -> config of MMDetection 3.
ROWS = {
    "faster_rcnn_R_50_FPN_1x_dconv_c3-c5": "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco",
    "faster_rcnn_R_50_FPN_1x_mdconv_c3-c5": "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco",
    "faster_rcnn_R_50_FPN_1x_mdconv_c3-c5_group4": "dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco",
    "faster_rcnn_R_50_FPN_1x_dpool": "dcn/faster-rcnn_r50_fpn_dpool_1x_coco",
    "faster_rcnn_R_50_FPN_1x_mdpool": "dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco",
    "faster_rcnn_R_101_FPN_1x_dconv_c3-c5": "dcn/faster-rcnn_r101-dconv-c3-c5_fpn_1x_coco",
    "faster_rcnn_X_101_32x4d_FPN_1x_dconv_c3-c5": "dcn/faster-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco",
    "mask_rcnn_R_50_FPN_1x_dconv_c3-c5": "dcn/mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco",
    "mask_rcnn_R_50_FPN_1x_mdconv_c3-c5": "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco",
    "mask_rcnn_R_101_FPN_1x_dconv_c3-c5": "dcn/mask-rcnn_r101-dconv-c3-c5_fpn_1x_coco",
    "cascade_rcnn_R_50_FPN_1x_dconv_c3-c5": "dcn/cascade-rcnn_r50-dconv-c3-c5_fpn_1x_coco",
    "cascade_rcnn_R_101_FPN_1x_dconv_c3-c5": "dcn/cascade-rcnn_r101-dconv-c3-c5_fpn_1x_coco",
    "cascade_mask_rcnn_R_50_FPN_1x_dconv_c3-c5": "dcn/cascade-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco",
    "cascade_mask_rcnn_R_101_FPN_1x_dconv_c3-c5": "dcn/cascade-mask-rcnn_r101-dconv-c3-c5_fpn_1x_coco",
    "cascade_mask_rcnn_X_101_32x4d_FPN_1x_dconv_c3-c5": "dcn/cascade-mask-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco",
}
# Rows whose losses are compared too.
TRAINED_ROWS = (
    "mask_rcnn_R_50_FPN_1x_dconv_c3-c5",
    "faster_rcnn_R_50_FPN_1x_mdconv_c3-c5",
    "cascade_mask_rcnn_R_50_FPN_1x_dconv_c3-c5",
)

# Rows with deformable pooling -> the POOLER_TYPE of the other operator, which MMDetection uses since 2.3.
OTHER_POOLERS = {
    "faster_rcnn_R_50_FPN_1x_dpool": "DeformRoIPool",
    "faster_rcnn_R_50_FPN_1x_mdpool": "ModulatedDeformRoIPool",
}

# Largest differences allowed. FPN maps have values of the order of 1.
TOLERANCES = {
    "input": 0.0,
    "fpn": 1e-3,
    "proposals_px": 1e-2,
    "boxes_px": 1e-2,
    "scores": 1e-4,
    "mask_pixels": 1e-4,  # share of the pixels inside the masks
}
LOSS_TOLERANCE = 1e-4  # relative
# Largest difference of a parameter's gradient, relative to its norm. The derivative by an offset jumps where a sample
# crosses the centre of a pixel: MMDetection's own gradients of offset branches move by 4e-3 when its weights move by
# one rounding.
GRADIENT_TOLERANCE = 1e-2

TEST_SCALE = (800, 1333)  # shortest and longest side
SMALL_SCALE = (320, 533)
